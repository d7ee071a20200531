"""Who is let in to a benchmark over several machines, and who is not, in one process."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, replace

import pytest

from mlx_distributed import __version__
from mlx_distributed.cli.bench.meeting import Guest, Meeting, _dial, come
from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.control import Control
from mlx_distributed.errors import ConfigError, MlxDistributedError, TrainingError

OPTIONS = Options("latency", 2, (4,), ("fp32",), (), 1, True, True)


@contextmanager
def waiting(num_guests: int) -> Iterator[tuple[Meeting, Future[list[Guest]], list[str]]]:
    """A meeting that is under way, who will have come, and what people are told."""
    told: list[str] = []
    with closing(Meeting("127.0.0.1:0")) as meeting, ThreadPoolExecutor() as pool:
        yield meeting, pool.submit(meeting.wait, num_guests, told.append, 10.0), told


def test_who_comes_is_told_what_is_measured() -> None:
    with waiting(1) as (meeting, guests, told), ThreadPoolExecutor() as pool:
        coming = pool.submit(come, meeting.invitation.encode())
        (guest,) = guests.result()
        mine = meeting.begin(OPTIONS, [guest])
        control, job = coming.result()
        assert (mine["rank"], mine["host"], job["rank"], job["host"]) == (0, "127.0.0.1", 1, "127.0.0.1")
        assert {key: mine[key] for key in ("secret", "identity")} == {key: job[key] for key in ("secret", "identity")}
        assert job["options"] == json.loads(json.dumps(asdict(OPTIONS)))
        control.send(address="1.2.3.4:5")
        assert guest.control.receive() == {"address": "1.2.3.4:5"}
        control.close()
        assert guest.control.receive() is None
        guest.control.close()
    assert told == [f"{guest.name} (127.0.0.1) is here, 2 of 2"]


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
                (replace(meeting.invitation, token="00" * 16), "lets nobody into a benchmark with this join string"),
                (replace(meeting.invitation, fingerprint="00" * 32), "shows another certificate"),
            ):
                with pytest.raises(ConfigError, match=words):
                    come(wrong.encode())
            assert not guests.done()
            with ThreadPoolExecutor() as pool:
                coming = pool.submit(come, meeting.invitation.encode())
                (guest,) = guests.result()
                guest.control.close()
                with pytest.raises(MlxDistributedError, match="has ended before all workers were there"):
                    coming.result()
            assert silent.fileno() > 0
    with pytest.raises(TrainingError, match="no coordinator answers"):
        come(meeting.invitation.encode())


def come_as(name: str, meeting: Meeting, version: str = __version__) -> Control:
    control = Control(_dial(meeting.invitation))
    control.send(token=meeting.invitation.token, program_version=version, name=name, host="h")
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
        with closing(come_as("a", meeting, "0.0.1")) as a:
            assert a.receive() == {"program_version": __version__}
        with closing(come_as("b", meeting)):
            guests.result()[0].control.close()


def test_a_meeting_gives_up_in_words() -> None:
    with closing(Meeting("127.0.0.1:0")) as meeting:
        with pytest.raises(MlxDistributedError, match=r"gave up after 0 s: 1 of 3 workers are here \(this machine\)"):
            meeting.wait(2, lambda line: None, 0.0)
        with pytest.raises(ConfigError, match="cannot be listened on"):
            Meeting(meeting.invitation.address)
