"""The progress of a run, for the person who watches it or the log file that it is written to."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_LINE_FIELDS = {
    "train/loss": "loss {:.3f}",
    "train/learning_rate": "lr {:.1e}",
    "train/grad_norm": "grad {:.2f}",
    "perf/tokens_per_s": "{:,.0f} tok/s",
}
_BAR_FIELDS = {name: _LINE_FIELDS[name] for name in ("train/loss", "perf/tokens_per_s")}  # fit into 80 columns
_EVAL_PREFIX = "eval/"
_ETA_WINDOW = 50


class ConsoleTracker:
    """A progress bar where the stream is a terminal, otherwise a line for every logged step.

    Nobody has to be listening: a pipe that breaks or a closed stream ends the output, not the run.

    Args:
        total_steps: of the whole run.
        stream: standard output by default.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console  # here, as the command that starts the workers needs none of it

        lossy = _LossyStream(sys.stdout if stream is None else stream)
        # Not left to rich, which takes FORCE_COLOR, as CI systems set it, for a terminal.
        self._console = Console(file=cast(IO[str], lossy), force_terminal=lossy.isatty())
        self._total_steps, self._clock = total_steps, clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=_ETA_WINDOW)
        self._bar = _Bar(self._console, total_steps) if self._console.is_interactive else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Training and evaluation get a line each. Where there is a bar, it shows the training."""
        if "train/loss" in metrics:
            self._marks.append((step, self._clock()))
            eta = f"eta {_eta(self._marks, self._total_steps)}"
            if self._bar is None:
                self._line(step, "  ".join([*_formatted(metrics, _LINE_FIELDS), eta]))
            else:
                self._bar.show(step, "  ".join([*_formatted(metrics, _BAR_FIELDS), eta]))
        if evaluation := list(_evaluation(metrics)):
            self._line(step, "eval " + "  ".join(evaluation))

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Not shown: some are printed when the run is over."""

    def message(self, text: str) -> None:
        """May be called from any thread."""
        self._console.out(text, highlight=False)

    def rewind(self, step: int) -> None:
        """What was said stays, and is said twice then."""

    def inputs(self, data: Mapping[str, Any]) -> None:
        """Not shown: messages say it."""

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        self._line(step, f"saved {folder} ({', '.join(aliases)})")

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        """Not shown: messages say it."""

    def finish(self, exit_status: int) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, step: int, text: str) -> None:
        self.message(f"step {step}/{self._total_steps}  {text}")


class _Bar:
    def __init__(self, console: Console, total_steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            auto_refresh=False,  # a thread of rich's would take time from the training; a refresh is 0.3 ms
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=total_steps, status="")

    def show(self, step: int, status: str) -> None:
        self._progress.start()
        self._progress.update(self._task, completed=step, status=status, refresh=True)

    def stop(self) -> None:
        self._progress.stop()


class _LossyStream:
    """Passes text on for as long as the stream takes it, and never raises."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None is what Python makes of a standard output that was closed from the start
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def write(self, text: str) -> int:
        # A model may generate what the encoding of the stream does not have.
        self._try(lambda stream: stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except (OSError, ValueError):  # ValueError is how Python says closed
            stream, self._stream = self._stream, None
            # Python flushes standard output once more as it exits; were that to fail, the exit status would be 120.
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as devnull:
                os.dup2(devnull.fileno(), stream.fileno())


def _formatted(metrics: Mapping[str, float], formats: Mapping[str, str]) -> list[str]:
    return [text.format(metrics[name]) for name, text in formats.items() if name in metrics]


def _evaluation(metrics: Mapping[str, float]) -> Iterator[str]:
    """As in `bleu 41.2 [38.7, 43.9]`, with the interval where there is one."""
    for name, value in metrics.items():
        if name.startswith(_EVAL_PREFIX) and not name.endswith(("_low", "_high")):
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
            yield f"{name.removeprefix(_EVAL_PREFIX).replace('_', ' ')} {value:.4g}{interval}"


def _eta(marks: Sequence[tuple[int, float]], total_steps: int) -> str:
    """Time for the remaining steps at the pace of `marks`, pairs of step and seconds in order; as in 0:01:12."""
    (first_step, first_s), (step, now_s) = marks[0], marks[-1]
    if step <= first_step:
        return "-:--:--"
    return str(timedelta(seconds=round((now_s - first_s) / (step - first_step) * max(total_steps - step, 0))))
