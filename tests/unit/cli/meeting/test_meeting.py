"""Who is let in to a group over several machines, and who is not, in one process."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.metadata import version

import pytest

from mlx_distributed import __version__
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.elastic.reach import dial
from mlx_distributed.cli.meeting.guest import come
from mlx_distributed.cli.meeting.host import Guest, Meeting
from mlx_distributed.cli.meeting.place import Line, ranks
from mlx_distributed.errors import ConfigError, MlxDistributedError, TrainingError


@contextmanager
def waiting(num_guests: int) -> Iterator[tuple[Meeting, Future[list[Guest]], list[str]]]:
    """A meeting of a run that is under way, who will have come, and what people are told."""
    told: list[str] = []
    with closing(Meeting("127.0.0.1:0", "run", "--listen ")) as meeting, ThreadPoolExecutor() as pool:
        yield meeting, pool.submit(meeting.wait, 1, 1 + num_guests, told.append, 10.0), told


def test_who_comes_is_told_what_is_to_be_done() -> None:
    with waiting(3) as (meeting, guests, told), ThreadPoolExecutor() as pool:
        coming = pool.submit(come, meeting.invitation, "run", 2)
        while len(told) < 1:
            pass
        alone = pool.submit(come, meeting.invitation, "run", 1, "127.0.0.2")
        mine, lines = meeting.begin({"of": ["run"]}, 1, guests.result())
        control, second = coming.result()
        other, third = alone.result()
        assert [(place.first_rank, place.num_workers) for place in (mine, second, third)] == [(0, 1), (1, 2), (3, 1)]
        assert [place.host for place in (mine, second, third)] == ["127.0.0.1", "127.0.0.1", "127.0.0.2"]
        name = mine.machines[0].removesuffix(" (127.0.0.1)")
        assert list(mine.machines) == second.machines == [f"{name} (127.0.0.1)"] * 3 + [f"{name} (127.0.0.2)"]
        assert (mine.secret, mine.identity, mine.job) == (second.secret, second.identity, second.job)
        assert mine.job == {"of": ["run"]}
        assert mine.secret not in repr(mine)
        assert [line.who for line in lines] == [
            f"ranks 1 to 2, {name} (127.0.0.1)",
            f"rank 3, {name} (127.0.0.2)",
        ]
        control.send(addresses=["1.2.3.4:5", "1.2.3.4:6"])
        assert lines[0].addresses() == ["1.2.3.4:5", "1.2.3.4:6"]
        control.close()
        assert lines[0].receive() == {}
        for each in (other, *(line.control for line in lines)):
            each.close()
    assert told == [f"{name} (127.0.0.1) is here, 3 of 4", f"{name} (127.0.0.2) is here, 4 of 4"]


def test_strangers_are_not_let_in_and_hold_nobody_up() -> None:
    with waiting(1) as (meeting, guests, _):
        address = ("127.0.0.1", int(meeting.invitation.address.rpartition(":")[2]))
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(address) as silent, socket.create_connection(address) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            for said in (b"nonsense\n", b"[]\n", b"x" * 5000, b'{"token": 7}\n'):
                with context.wrap_socket(socket.create_connection(address)) as line:
                    line.sendall(said)
                    assert line.recv(100) == b""
            for wrong, words in (
                (replace(meeting.invitation, token="00" * 16), "lets nobody into a run with this join string"),
                (replace(meeting.invitation, fingerprint="00" * 32), "shows another certificate"),
                (replace(meeting.invitation, kind="elastic"), "is of an elastic run, and not of a run of machines"),
            ):
                with pytest.raises(ConfigError, match=words):
                    come(wrong, "run")
            assert not guests.done()
            with ThreadPoolExecutor() as pool:
                coming = pool.submit(come, meeting.invitation, "run")
                (guest,) = guests.result()
                guest.control.close()
                with pytest.raises(MlxDistributedError, match="has ended before all workers were there"):
                    coming.result()
            assert silent.fileno() > 0
    with pytest.raises(TrainingError, match="no first machine of the group answers"):
        come(Invitation.decode(meeting.invitation.encode()), "run")


def come_as(name: str, meeting: Meeting, **other: object) -> Control:
    control = Control(dial(meeting.invitation))
    versions = {"program_version": __version__, "mlx_version": version("mlx")}
    who = {"name": name, "host": "h", "what": "run", "num_workers": 1}
    control.send(token=meeting.invitation.token, **(versions | who | other))
    return control


def test_who_goes_again_is_not_counted() -> None:
    with waiting(2) as (meeting, guests, told):
        with closing(come_as("a", meeting)) as a:
            assert a.receive() == {"welcome": True}
        while len(told) < 2:
            pass
        assert told == ["a (h) is here, 2 of 3", "a (h) has gone"]
        with closing(come_as("b", meeting)), closing(come_as("c", meeting)):
            assert {guest.name for guest in guests.result()} == {"b", "c"}
            for guest in guests.result():
                guest.control.close()


def test_another_version_is_told_which_one_this_is() -> None:
    with waiting(1) as (meeting, guests, _):
        with closing(come_as("a", meeting, program_version="0.0.1")) as a:
            assert a.receive() == {"program_version": __version__}
        with closing(come_as("b", meeting)):
            guests.result()[0].control.close()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"what": "benchmark"}, "it is a run; use mlx-train --join"),
        ({"mlx_version": "0.1"}, r"MLX 0\.1 there and .* here: the same bits are promised within one version only"),
        ({"mlx_version": ["\x1b[31m"]}, r"MLX \['\\x1b\[31m'\] there"),
        ({"num_workers": 0}, "it brings no workers"),
        ({"num_workers": "2"}, "it brings no workers"),
        ({"num_workers": True}, "it brings no workers"),
        ({"num_workers": 2}, "it brings 2 workers, and of 2 there is room for 1; use --nproc 1"),
    ],
)
def test_who_does_not_fit_is_told_why(other: dict[str, object], words: str) -> None:
    with waiting(1) as (meeting, guests, told):
        with closing(come_as("a\x1b", meeting, **other)) as a:
            assert re.search(words, (a.receive() or {})["refused"])
            assert a.receive() is None
        with closing(come_as("b", meeting)):
            guests.result()[0].control.close()
    assert told in (
        ["b (h) is here, 2 of 2"],
        ["a (h) is turned away: it brings 2 workers, and there is room for 1", "b (h) is here, 2 of 2"],
    )


def test_who_is_refused_says_so() -> None:
    with waiting(1) as (meeting, guests, _):
        with pytest.raises(ConfigError, match=r"at 127\.0\.0\.1:\d+, refuses this one: it is a run; use mlx-train"):
            come(meeting.invitation, "benchmark")
        with closing(come_as("b", meeting)):
            guests.result()[0].control.close()


def test_a_meeting_gives_up_in_words() -> None:
    def refuse() -> None:
        raise MlxDistributedError("a host cannot take part")

    with closing(Meeting("127.0.0.1:0", "benchmark", "--listen ")) as meeting:
        with pytest.raises(MlxDistributedError, match=r"gave up after 0 s: 1 of 3 workers are here \(this machine\)"):
            meeting.wait(1, 3, lambda line: None, 0.0)
        with pytest.raises(MlxDistributedError, match="a host cannot take part"):
            meeting.wait(1, 3, lambda line: None, check=refuse)
        with pytest.raises(ConfigError, match=r"^--listen 127\.0\.0\.1:\d+: cannot be listened on"):
            Meeting(meeting.invitation.address, "benchmark", "--listen ")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"addresses": [7]}, "b has gone, or does not say where its workers are"),
        ({"addresses": "10.0.0.7:1"}, "b has gone, or does not say where its workers are"),
        ({"ended": 2, "error": "no such model"}, "b: no such model"),
        ({"ended": 130, "error": None}, "b: it was interrupted"),
        ({"ended": 1}, "b: it has ended"),
    ],
)
def test_what_a_machine_says_in_place_of_addresses(said: dict[str, object], words: str) -> None:
    ours, theirs = map(Control, socket.socketpair())
    with closing(ours), closing(theirs):
        theirs.send(**said)
        with pytest.raises(MlxDistributedError, match=f"^{words}$") as caught:
            Line(ours, "b").addresses()
        assert caught.type is (ConfigError if said.get("ended") == 2 else MlxDistributedError)


@pytest.mark.parametrize("data", [b"nonsense\n", b"7\n", b"[" * 100_000 + b"\n", b"\xff\n"], ids=repr)
def test_what_is_no_message_says_nothing(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        assert Line(Control(ours), "b").receive() == {}


def test_ranks_in_words() -> None:
    assert (ranks(3, 1), ranks(3, 2)) == ("rank 3", "ranks 3 to 4")
