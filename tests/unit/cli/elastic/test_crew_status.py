from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mlx_distributed.cli.elastic.crew import Crew, exit_status, hostname
from mlx_distributed.elastic.protocol import End

DONE, FAILED = End("all steps are taken", failed=False), End("gave up", failed=True)


@pytest.mark.parametrize(
    ("statuses", "num_interrupts", "end", "status"),
    [
        ([0, 0], 0, DONE, 0),
        ([-9, 0], 0, DONE, 0),
        ([1, 1], 0, FAILED, 1),
        ([-9, -9], 0, DONE, 0),  # others have ended the run
        ([-9, -9], 0, None, 1),
        ([2, 2], 0, None, 2),
        ([2, -9], 0, None, 2),
        ([0, 1], 0, None, 0),
        ([130, 130], 1, None, 130),
        ([130, 0], 1, DONE, 130),
        ([130, 130], 0, None, 130),  # interrupted on another machine
        ([-2, -15], 1, None, 130),
        ([-15], 0, None, 1),
        ([], 0, FAILED, 1),
    ],
)
def test_exit_status(statuses: list[int], num_interrupts: int, end: End | None, status: int) -> None:
    assert exit_status(statuses, num_interrupts, end) == status


@pytest.mark.parametrize(
    ("number", "joined", "passed_on"),
    [
        (signal.SIGINT, True, "SIGINT"),
        (signal.SIGTERM, True, "SIGTERM"),
        (signal.SIGINT, False, "SIGINT"),
        (signal.SIGTERM, False, "SIGINT"),  # ends the run, in good order, as its coordinator ends too
    ],
)
def test_what_ends_a_command_is_passed_on(
    number: signal.Signals, joined: bool, passed_on: str, capfd: pytest.CaptureFixture[str]
) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    crew = Crew([{"seat": {"name": "a", "joined": joined}}], [None], env, module="telltale")
    try:
        os.kill(os.getpid(), number)
        while crew.watch(0.1):
            pass
    finally:
        crew.close()
    assert capfd.readouterr() == ("", f"error: {passed_on}\n")


def test_the_name_of_a_machine_has_no_domain() -> None:
    assert hostname()
    assert "." not in hostname()
