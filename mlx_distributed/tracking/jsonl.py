"""metrics.jsonl: every measurement of a run, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mlx_distributed.errors import ConfigError, TrainingError


class JsonlTracker:
    """Appends `{"step": 12, ...}` a line, flushed line by line.

    NaN and infinities are written as null: strict parsers refuse `NaN`, and plots show null as a gap.

    Args:
        path: the file; its folder is made.
        resume_step: step of the checkpoint that the run goes on from. Lines of later steps are dropped, and so is a
            line torn by a kill, so that the lines are those of a run never interrupted. None starts an empty file.
        resume_metrics: evaluations of that step that the checkpoint holds; others of it will be made again. None: it
            has all of them.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None = None, resume_metrics: Collection[str] | None = ()) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and path.exists():
                _drop_lines_after(path, resume_step, resume_metrics)
            self._file = path.open("w" if resume_step is None else "a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another output_dir") from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Raises TrainingError where the line cannot be written, as on a full disk."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"the metrics of step {step} cannot be written to {self._path} ({error.strerror}); "
                "what was saved is whole: make room and go on with --resume"
            ) from error

    def message(self, text: str) -> None:
        """Not written: the file holds numbers."""

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        """Not written: the file holds numbers."""

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps. Raises TrainingError where the file cannot be written."""
        try:
            self._file.close()
            _drop_lines_after(self._path, step, None)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{self._path} cannot be written ({error.strerror})") from error

    def finish(self, exit_status: int) -> None:
        with contextlib.suppress(OSError):  # of a full disk; `log` has raised it already
            self._file.close()


def _drop_lines_after(path: Path, step: int, evaluated: Collection[str] | None) -> None:
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if _stays(line, step, evaluated)]
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(b"".join(kept))
    aside.replace(path)


def _stays(line: bytes, step: int, evaluated: Collection[str] | None) -> bool:
    """Whether a line is whole, and its metrics will not be measured again by a run that goes on from `step`."""
    try:
        metrics = json.loads(line) if line.endswith(b"\n") else {}
        at = int(metrics["step"])
    except (ValueError, KeyError, TypeError):
        return False
    if at != step or evaluated is None:
        return at <= step
    return all(name in evaluated for name in metrics if name.startswith("eval/"))
