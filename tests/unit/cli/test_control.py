from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mlx_distributed.cli.control import Control

WATCHED = """
import signal, socket, sys
from mlx_distributed.cli.control import Control
control = Control(socket.socket(fileno=int(sys.argv[1])))
control.exit_with_parent()
control.send(watching=True)
while True:
    signal.pause()
"""


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def line(sockets: tuple[socket.socket, socket.socket]) -> Iterator[tuple[Control, Control]]:
    ours, theirs = map(Control, sockets)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_whole_and_in_order(line: tuple[Control, Control]) -> None:
    ours, theirs = line
    ours.send(text="Zeile 1\nZeile 2 äöü 🙂", number=3, nothing=None)
    ours.send(addresses=["127.0.0.1:1", "127.0.0.1:2"] * 200)
    theirs.send(error="no such file")
    assert theirs.receive() == {"text": "Zeile 1\nZeile 2 äöü 🙂", "number": 3, "nothing": None}
    assert theirs.receive() == {"addresses": ["127.0.0.1:1", "127.0.0.1:2"] * 200}
    assert ours.receive() == {"error": "no such file"}


def test_what_came_together_is_heard_one_by_one(line: tuple[Control, Control]) -> None:
    ours, theirs = line
    theirs.send(number=1)
    theirs.send(number=2)
    assert ours.receive() == {"number": 1}
    assert ours.heard(0.0)
    assert ours.receive() == {"number": 2}
    assert not ours.heard(0.0)
    theirs.close()
    assert ours.heard(0.0)


def test_who_hangs_up_can_still_hear(line: tuple[Control, Control]) -> None:
    ours, theirs = line
    ours.send(job=1)
    ours.hang_up()
    ours.send(job=2)  # goes nowhere
    assert [theirs.receive(), theirs.receive()] == [{"job": 1}, None]
    theirs.send(error="why")
    assert ours.receive() == {"error": "why"}


def test_what_was_said_before_the_end_is_heard_after_it(line: tuple[Control, Control]) -> None:
    ours, theirs = line
    theirs.send(error="why")
    theirs.close()
    assert [ours.receive(), ours.receive(), ours.receive()] == [{"error": "why"}, None, None]


def test_the_other_side_is_gone(line: tuple[Control, Control]) -> None:
    ours, theirs = line
    ours.send(never="read")  # makes the end of the other side a reset
    theirs.close()
    assert ours.receive() is None
    ours.send(to="nobody")
    ours.hang_up()
    ours.close()


def test_half_a_message_is_none(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = sockets
    control = Control(ours)
    theirs.sendall(b'{"address": "127.')
    theirs.close()
    assert control.receive() is None
    control.close()


def test_a_process_ends_when_the_other_side_has_gone() -> None:
    ours, theirs = socket.socketpair()
    control = Control(ours)
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", WATCHED, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    with process:
        assert control.receive() == {"watching": True}
        control.send(still="here")
        control.close()
        assert process.wait(timeout=30) == 1
