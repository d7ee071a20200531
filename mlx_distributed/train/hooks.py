"""What happens after a commit: `hook(state, info)`, which may read the state and never reaches into the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import BucketLayout
from mlx_distributed.data.tokenize import Row
from mlx_distributed.tracking import Tracker
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.best import EVAL_LOSS, cost
from mlx_distributed.train.checkpoint import Checkpointer, CheckpointMeta
from mlx_distributed.train.evaluation import Sample, Scored, evaluate_loss
from mlx_distributed.train.pipeline import Pipeline
from mlx_distributed.train.private import collect, give, missing
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

Hook = Callable[[TrainState, StepInfo], None]


def due(every: int | None, step: int, num_steps: int = 1) -> bool:
    """Whether what is to happen every so many steps, or never, happens after the last `num_steps` up to this one."""
    return every is not None and step // every > (step - num_steps) // every


def every(num_steps: int | None, hook: Hook) -> Hook:
    """Run the hook after every so many steps; never where `num_steps` is None."""

    def hook_when_due(state: TrainState, info: StepInfo) -> None:
        if due(num_steps, info.step, info.num_steps):
            hook(state, info)

    return hook_when_due


class Save:
    """Saves the state where there is something to save that has not been saved. Rank 0 saves for all, and the others
    give it what only they have.

    Args:
        checkpointer: used on rank 0 only.
        comm: of all ranks.
        layout: of the gradients.
        tracker: is told of each checkpoint.
        describe: what a checkpoint says of a state.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        comm: Communicator,
        layout: Sequence[BucketLayout],
        tracker: Tracker,
        describe: Callable[[TrainState], CheckpointMeta],
    ) -> None:
        self._checkpointer, self._comm, self._layout = checkpointer, comm, layout
        self._tracker, self._describe = tracker, describe
        best = checkpointer.best_metric() if comm.rank == 0 else None
        best = json.loads(broadcast_bytes(json.dumps(best).encode(), comm, "the best evaluation so far"))
        self._lowest_cost = cost(checkpointer.metric, best)
        self._saved: tuple[int, dict[str, float]] = (0, {})

    def mark(self, state: TrainState) -> None:
        """The state has just been restored from a checkpoint: there is nothing new in it."""
        self._saved = (state.step, state.metrics)

    def is_best(self, state: TrainState) -> bool:
        """Whether the state has been evaluated, and is better than all that were saved."""
        return self._cost(state) < self._lowest_cost

    def __call__(self, state: TrainState, info: StepInfo | None = None) -> None:
        """To be called on all ranks at the same step. Raises CheckpointError where it fails, CommError on a loss."""
        self._save(state, self._comm)

    def alone(self, state: TrainState) -> None:
        """Save on this rank alone, which has lost the others: what compression has left out there is not in it. Without
        their moments there would be nothing to go on with, so of a shard nothing is saved."""
        if state.pending is not None and not state.pending.here:
            state.pending = None  # It is lost with the peer, and computed again after a resume.
        if not self._checkpointer.has(state.step):
            self._saved = (0, {})  # A state that was had from others is nowhere in this folder.
        self._save(state, LocalComm())

    def _save(self, state: TrainState, comm: Communicator) -> None:
        if not state.step or self._saved == (state.step, state.metrics):
            return
        if lacking := missing(state, self._layout, comm):
            if self._saved[0] != state.step:
                last = self._checkpointer.find("auto")
                name = last.folder.name if last else "there is none yet"
                self._tracker.message(
                    f"step {state.step} cannot be saved, as every worker had a part of {lacking}: "
                    f"--resume goes on from the last whole checkpoint ({name})"
                )
            return
        if state.pending is not None:
            state.pending.settle(state.feedback)  # On all ranks: who leaves early would leave the others without.
        aliases = ["latest", f"step-{state.step}", *(["best"] if self.is_best(state) else [])]
        if comm.rank == 0:
            of_ranks = collect(state, self._layout, comm)
            folder = self._checkpointer.save(state.parameters, state.shared, self._describe(state), of_ranks)
            self._tracker.checkpoint(folder, state.step, aliases)
        else:
            give(state, self._layout, comm)
        self._lowest_cost = min(self._lowest_cost, self._cost(state))
        self._saved = (state.step, state.metrics)

    def _cost(self, state: TrainState) -> float:
        return cost(self._checkpointer.metric, state.metrics.get(self._checkpointer.metric))


@dataclass(frozen=True)
class Answering:
    """How answers are generated and compared with the data."""

    generate: Callable[[nn.Module], list[Sample]]
    """Called on all ranks at once; not without rows. May raise CommError."""
    score: Callable[[Sequence[Sample]], Scored]
    """Called on rank 0 alone: logarithms may differ in the last digit from machine to machine."""


class Evaluate:
    """Measures the loss over the validation rows and generates answers, on all ranks together; does nothing where there
    are no rows.

    Args:
        batches: rows for validation, in micro-batches.
        comm: over which they are shared.
        tracker: is told the figures, and of generated answers, by rank 0.
        save_best: called where the state is the best so far; None where that does not matter.
        pipeline: that the model is spread over; None where every rank has all of it.
        answering: None where nothing is generated.
        everyone: all ranks, where `comm` is not; they get the figures of rank 0.
        metric: that is added to the evaluations of the state.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Row]],
        comm: Communicator,
        tracker: Tracker,
        save_best: Save | None,
        pipeline: Pipeline | None = None,
        answering: Answering | None = None,
        everyone: Communicator | None = None,
        metric: str = EVAL_LOSS,
    ) -> None:
        self._batches, self._comm = batches, comm
        self._tracker, self._save_best, self._pipeline = tracker, save_best, pipeline
        self._answering, self._everyone, self._metric = answering, everyone or comm, metric
        self.samples: list[Sample] = []
        """Of the last evaluation."""
        self.scored: Scored | None = None
        """Of the last evaluation, on rank 0."""

    def __call__(self, state: TrainState, info: StepInfo | None = None) -> None:
        if not self._batches:
            return
        metrics = evaluate_loss(state.model, self._batches, self._comm, self._pipeline)
        if self._answering is not None:
            self.samples = self._answering.generate(state.model)
            if self._everyone.rank == 0:
                metrics |= self._score(self._answering.score(self.samples))
        told = broadcast_bytes(json.dumps(metrics).encode(), self._everyone, "the evaluation")
        state.metrics = json.loads(told)
        state.evaluations = state.evaluations | {state.step: state.metrics[self._metric]}
        self._tracker.log(state.metrics, state.step)
        if self.scored is not None:
            self._tracker.samples(self.scored.records, state.step)
        if self._save_best is not None and self._save_best.is_best(state):
            self._save_best(state)

    def _score(self, scored: Scored) -> dict[str, float]:
        if self.scored is None:
            for name, signature in scored.signatures.items():
                self._tracker.message(f"{name}: {signature}")
        self.scored = scored
        return scored.metrics
