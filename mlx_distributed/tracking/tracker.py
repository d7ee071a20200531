"""What every tracker does, several trackers as one, and those that a configuration asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from mlx_distributed.config import Config, to_dict
from mlx_distributed.errors import MlxDistributedError
from mlx_distributed.tracking.console import ConsoleTracker
from mlx_distributed.tracking.jsonl import JsonlTracker
from mlx_distributed.tracking.wandb_tracker import WandbTracker


class Tracker(Protocol):
    """One place that a run reports to."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Measurements of optimizer step `step`, named as in metrics.jsonl. Steps do not go back."""

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Generated answers of an evaluation, all with the same names: `row`, `prompt`, `generated`, `reference`, and
        figures of this answer named as in metrics.jsonl."""

    def rewind(self, step: int) -> None:
        """What was said of later steps may not be whole, and will be said once more."""

    def message(self, text: str) -> None:
        """Something for people: a notice, a generated sample."""

    def inputs(self, data: Mapping[str, Any]) -> None:
        """What the run trains on, besides its configuration: plain values that say which rows, not what is in them."""

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        """The checkpoint of `step` is whole on disk in `folder`. Aliases: `latest`, `best`, `step-N`."""

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        """The finished model is whole on disk in `folder`: that of `step`, which has been evaluated to `metrics`."""

    def finish(self, exit_status: int) -> None:
        """Nothing follows. The status is that of the command; 0 is success."""


class Trackers:
    """Several trackers as one. In a `with`, it finishes with the exit status that the exception stands for, or 0."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        for tracker in self._trackers:
            tracker.samples(records, step)

    def rewind(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.rewind(step)

    def message(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.message(text)

    def inputs(self, data: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.inputs(data)

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        for tracker in self._trackers:
            tracker.checkpoint(folder, step, aliases)

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.final(folder, step, metrics)

    def finish(self, exit_status: int) -> None:
        """Finishes all of them, the last one first. A second call does nothing."""
        trackers, self._trackers = self._trackers, ()
        with contextlib.ExitStack() as stack:
            for tracker in trackers:
                stack.callback(tracker.finish, exit_status)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.finish(_exit_status(error))


def open_tracker(
    config: Config,
    total_steps: int,
    wandb_id: str,
    resume_step: int | None = None,
    resume_metrics: Collection[str] | None = (),
    console: TextIO | None = None,
) -> Trackers:
    """What `config` asks for: files of JSON lines and the console always, Weights & Biases where a project is set.

    Args:
        config: the resolved configuration.
        total_steps: optimizer steps of the whole run.
        wandb_id: of this run, from `new_wandb_id` or from the checkpoint.
        resume_step: step of the checkpoint that the run goes on from; None for a new run.
        resume_metrics: evaluations of that step that the checkpoint holds; None: all that were made.
        console: standard output by default.

    Raises:
        ConfigError: `output_dir` cannot be written.
    """
    screen = ConsoleTracker(total_steps, console)
    trackers: list[Tracker] = [JsonlTracker(config.output_dir / "metrics.jsonl", resume_step, resume_metrics), screen]
    if _uses_wandb(config):
        resolved = to_dict(config)
        trackers.append(WandbTracker(config.wandb, wandb_id, resolved, config.output_dir, notify=screen.message))
    return Trackers(trackers)


def open_worker_tracker(
    config: Config, total_steps: int, wandb_id: str, worker: str, tells: bool, console: TextIO | None = None
) -> Trackers:
    """What `config` asks for on a worker that is not rank 0: the console, and measurements of its machine.

    Args:
        config: the resolved configuration.
        total_steps: optimizer steps of the whole run.
        wandb_id: of the run.
        worker: its name, of no other worker.
        tells: whether anybody looks at the console.
        console: standard output by default.
    """
    trackers: list[Tracker] = [ConsoleTracker(total_steps, console)] if tells else []
    if config.wandb.system_metrics and _uses_wandb(config):
        notify = Trackers(trackers).message
        resolved = to_dict(config)
        trackers.append(WandbTracker(config.wandb, wandb_id, resolved, config.output_dir, notify=notify, worker=worker))
    return Trackers(trackers)


def _uses_wandb(config: Config) -> bool:
    return config.wandb.project is not None and config.wandb.mode != "disabled"


def _exit_status(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_status if isinstance(error, MlxDistributedError) else 1
