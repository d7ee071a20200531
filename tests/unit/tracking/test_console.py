"""What is printed, to a terminal and to anything else, and that a reader who leaves does no harm."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from mlx_distributed.tracking import ConsoleTracker

METRICS = {
    "train/loss": 1.2341,
    "train/num_tokens": 812,
    "train/learning_rate": 4.8e-3,
    "train/grad_norm": 0.7099,
    "perf/tokens_per_s": 9031.4,
    "perf/step_s": 0.09,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def clock(times: Iterable[float]) -> Callable[[], float]:
    return iter(times).__next__


def test_a_line_for_each_logged_step_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(300, stream, clock([100.0, 102.5, 120.0]))
    tracker.log(METRICS, 30)
    tracker.log({"train/loss": 1.5}, 31)
    tracker.log(METRICS, 40)
    tracker.finish(0)
    assert stream.getvalue().splitlines() == [
        "step 30/300  loss 1.234  lr 4.8e-03  grad 0.71  9,031 tok/s  eta -:--:--",
        "step 31/300  loss 1.500  eta 0:11:12",
        "step 40/300  loss 1.234  lr 4.8e-03  grad 0.71  9,031 tok/s  eta 0:08:40",
    ]


def test_an_evaluation_takes_a_line_with_its_intervals() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(300, stream)
    tracker.log({"eval/loss": 1.25, "eval/bleu": 41.234, "eval/bleu_low": 38.7, "eval/bleu_high": 43.91}, 40)
    tracker.samples([{"row": 0, "generated": "nine"}], 40)
    assert stream.getvalue() == "step 40/300  eval loss 1.25  bleu 41.23 [38.7, 43.91]\n"


def test_the_eta_follows_the_pace_of_late() -> None:
    stream = io.StringIO()
    times = [1000.0 * step for step in range(100)] + [99_000.0 + step for step in range(1, 101)]
    tracker = ConsoleTracker(260, stream, clock(times))
    for step in range(1, 201):
        tracker.log({"train/loss": 1.0}, step)
    assert stream.getvalue().splitlines()[-1].endswith("eta 0:01:00")


def test_the_eta_of_the_last_step_is_zero_even_if_there_are_more_steps_than_were_announced() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(2, stream, clock([0.0, 1.0, 2.0]))
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0}, step)
    assert [line[-7:] for line in stream.getvalue().splitlines()] == ["-:--:--", "0:00:00", "0:00:00"]


def test_evaluation_checkpoints_and_messages_are_lines() -> None:
    stream = io.StringIO()
    tracker = ConsoleTracker(300, stream)
    tracker.log({"eval/loss": 0.28351, "eval/perplexity": 1.32777, "eval/exact_match": 0.5}, 40)
    tracker.checkpoint(Path("runs/a/checkpoints/step-00000040"), 40, ["latest", "best", "step-40"])
    tracker.message("[bold]not markup[/bold] :smile: " + "x" * 200 + "\nsecond line")
    assert stream.getvalue().splitlines() == [
        "step 40/300  eval loss 0.2835  perplexity 1.328  exact match 0.5",
        "step 40/300  saved runs/a/checkpoints/step-00000040 (latest, best, step-40)",
        "[bold]not markup[/bold] :smile: " + "x" * 200,
        "second line",
    ]


def test_a_bar_on_a_terminal(terminal: Terminal) -> None:
    tracker = ConsoleTracker(4, terminal, clock([0.0, 10.0, 20.0, 30.0]))
    for step in (1, 2):
        tracker.log(METRICS, step)
    tracker.log({"eval/loss": 0.5}, 2)
    tracker.finish(0)
    shown = terminal.getvalue()
    assert "step 2/4" in shown
    assert "loss 1.234  9,031 tok/s  eta 0:00:20" in shown
    assert "step 2/4  eval loss 0.5\n" in shown
    assert "lr " not in shown
    assert shown.endswith("\n\x1b[?25h")  # the cursor is back, on a line of its own


def test_the_bar_ends_quietly_if_nothing_was_logged(terminal: Terminal) -> None:
    ConsoleTracker(4, terminal).finish(1)
    assert terminal.getvalue() == ""


def test_a_terminal_that_cannot_move_the_cursor_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    ConsoleTracker(4, terminal, clock([0.0])).log({"train/loss": 1.0}, 1)
    assert terminal.getvalue() == "step 1/4  loss 1.000  eta -:--:--\n"


def test_forced_colours_do_not_make_a_file_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    ConsoleTracker(4, stream, clock([0.0])).log({"train/loss": 1.0}, 1)
    assert stream.getvalue() == "step 1/4  loss 1.000  eta -:--:--\n"


def test_what_the_encoding_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ConsoleTracker(4, stream).message("Gr\u00fc\u00dfe \ud800")
    assert raw.getvalue() == b"Gr\\xfc\\xdfe \\ud800\n"


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleTracker(4).message("hello")
    assert capsys.readouterr().out == "hello\n"


def test_without_standard_output_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    tracker = ConsoleTracker(4)
    tracker.log(METRICS, 1)
    tracker.finish(0)


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_stream_that_is_closed_meanwhile_ends_the_output_only(kind: type[io.StringIO]) -> None:
    stream = kind()
    tracker = ConsoleTracker(4, stream)
    tracker.log(METRICS, 1)
    stream.close()
    tracker.log(METRICS, 2)
    tracker.message("nobody reads this")
    tracker.finish(0)


def test_a_pipe_that_breaks_ends_the_output_only() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        tracker = ConsoleTracker(4, stream)
        tracker.log(METRICS, 1)
        os.close(reader)
        tracker.log(METRICS, 2)
        tracker.finish(0)
        stream.write("what others still print there goes nowhere")


def test_a_pipe_that_breaks_leaves_the_exit_status_alone() -> None:
    program = (
        "import sys\n"
        "from mlx_distributed.tracking import ConsoleTracker\n"
        "tracker = ConsoleTracker(4)\n"
        "tracker.message('first')\n"
        "sys.stdin.read()\n"
        "tracker.message('second')\n"
        "tracker.finish(3)\n"
        "print('third')\n"
        "sys.exit(3)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 3
