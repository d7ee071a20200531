"""metrics.jsonl: every measurement of a run, a JSON object a line. samples.jsonl: every generated answer, likewise."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distributed.errors import ConfigError, TrainingError

SAMPLES = "samples.jsonl"


class JsonlTracker:
    """Appends `{"step": 12, ...}` a line, flushed line by line; samples.jsonl is made with the first answers.

    NaN and infinities are written as null: strict parsers refuse `NaN`, and plots show null as a gap.

    Args:
        path: the file of metrics; its folder is made, and samples.jsonl stands in it too.
        resume_step: step of the checkpoint that the run goes on from. Lines of later steps are dropped, and so is a
            line torn by a kill, so that the lines are those of a run never interrupted. None starts an empty file.
        resume_metrics: evaluations of that step that the checkpoint holds; others of it will be made again. None: it
            has all of them.

    Raises:
        ConfigError: a file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None = None, resume_metrics: Collection[str] | None = ()) -> None:
        self._path, self._samples = path, path.with_name(SAMPLES)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                self._drop_lines_after(resume_step, resume_metrics)
            else:
                self._samples.unlink(missing_ok=True)
            self._file = path.open("w" if resume_step is None else "a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another output_dir") from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Raises TrainingError where the line cannot be written, as on a full disk."""
        try:
            self._file.writelines(_lines([metrics], step))
            self._file.flush()
        except OSError as error:
            raise _not_written(f"the metrics of step {step}", self._path, error) from error

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Raises TrainingError where they cannot be written."""
        try:
            with self._samples.open("a", encoding="utf-8") as file:
                file.writelines(_lines(records, step))
        except OSError as error:
            raise _not_written(f"the generated answers of step {step}", self._samples, error) from error

    def message(self, text: str) -> None:
        """Not written: the file holds numbers."""

    def inputs(self, data: Mapping[str, Any]) -> None:
        """Not written: the file is about steps."""

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        """Not written: the file holds numbers."""

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        """Not written: it was measured already."""

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps. Raises TrainingError where a file cannot be written."""
        try:
            self._file.close()
            self._drop_lines_after(step, None)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{self._path} cannot be written ({error.strerror})") from error

    def finish(self, exit_status: int) -> None:
        with contextlib.suppress(OSError):  # of a full disk; `log` has raised it already
            self._file.close()

    def _drop_lines_after(self, step: int, evaluated: Collection[str] | None) -> None:
        for path in (self._path, self._samples):
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                aside = path.with_name(path.name + ".tmp")
                aside.write_bytes(b"".join(line for line in lines if _stays(line, step, evaluated)))
                aside.replace(path)


def _lines(records: Iterable[Mapping[str, Any]], step: int) -> Iterable[str]:
    for record in records:
        yield json.dumps({"step": step, **without_gaps(record)}, allow_nan=False) + "\n"


def without_gaps(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with None for what is no number, or infinite."""
    return {name: None if _is_gap(value) else value for name, value in record.items()}


def _is_gap(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _not_written(what: str, path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{what} cannot be written to {path} ({error.strerror}); what was saved is whole: make room and go on with "
        "--resume"
    )


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
