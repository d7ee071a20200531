"""`Trainer`: the step, and the loop over steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from mlx_distributed.comm.base import Communicator, Parts
from mlx_distributed.errors import TrainingError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train import delayed, diloco
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

MAX_SKIPPED = 3
"""So many steps in a row without a finite gradient end the run."""


class Trainer:
    """Runs steps on a state.

    Args:
        phases: of the steps.
    """

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self._steps = {"step": self._synchronous, "delayed": delayed.steps, "diloco": diloco.steps}[
            phases.config.parallel.sync
        ]

    def steps(self, state: TrainState, mesh: Mesh) -> Iterator[StepInfo]:
        """Train to the end of the plan, or until a stop is requested; yields what is known of a step after each commit.

        With `parallel.sync: diloco` that is a few steps behind the state, but where a checkpoint or an evaluation is
        due, at the end, and before a stop.

        Raises:
            TrainingError: the loss or the gradient was not finite `MAX_SKIPPED` times in a row.
            CommError: a peer was lost; the state is that of the last commit.
        """
        for info in self._steps(self.phases, state, mesh.dp):
            yield replace(info, data_s=self.phases.take_data_s())
            check_progress(state, info)
            if info.stop_requested:
                return

    def train_step(self, state: TrainState, mesh: Mesh) -> StepInfo:
        """One synchronous step: compute, communicate, commit. Raises CommError; the state is then as before."""
        phases, comm = self.phases, mesh.dp
        start_s, work = time.monotonic(), phases.work(state.step)
        # Compute: the partial sums that this rank holds. Communicate: sums, never means.
        parts = _Stopwatch(phases.compute(state, work, comm))
        before = replace(comm.traffic)
        reduced = phases.reduce(state, work, parts, comm)
        comm_exposed_s = time.monotonic() - start_s - parts.elapsed_s
        after = replace(comm.traffic)
        phases.commit(state, work.step, reduced, comm)
        return reduced.info(
            step=state.step,
            learning_rate=phases.rate(work.step),
            step_s=time.monotonic() - start_s,
            comm_s=comm.traffic.reduce_s - before.reduce_s,
            comm_exposed_s=comm_exposed_s + comm.traffic.reduce_s - after.reduce_s,
            sent_bytes=comm.traffic.sent_bytes - before.sent_bytes,
        )

    def _synchronous(self, phases: Phases, state: TrainState, comm: Communicator) -> Iterator[StepInfo]:
        while state.step < phases.plan.num_steps:
            yield self.train_step(state, Mesh(comm))


def check_progress(state: TrainState, info: StepInfo) -> None:
    """Raise TrainingError where the last `MAX_SKIPPED` steps were all skipped."""
    if info.skipped and state.num_skipped >= MAX_SKIPPED:
        wider = "precision=bf16, which has the range that float16 lacks, " if state.loss_scale is not None else ""
        raise TrainingError(
            f"{info.skipped}. That was the {MAX_SKIPPED}rd step in a row: training stops here; "
            f"{wider}a lower optimizer.learning_rate or a look at the data of these steps may help"
        )


class _Stopwatch:
    """An iterator that measures the time spent inside it."""

    def __init__(self, inner: Iterator[Parts]) -> None:
        self._inner, self.elapsed_s = inner, 0.0

    def __iter__(self) -> _Stopwatch:
        return self

    def __next__(self) -> Parts:
        start_s = time.monotonic()
        try:
            return next(self._inner)
        finally:
            self.elapsed_s += time.monotonic() - start_s
