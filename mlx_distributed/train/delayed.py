"""`parallel.sync: delayed`: the sum of a step's gradients travels while the next step is computed.

So every gradient is of parameters that are one update old. To first order it can be brought up to date: with the square
of a gradient in place of the second derivative, g + strength * g * g * (parameters now - parameters then), where the
strength of an element is divided by the root of its mean square gradient, which is the second moment of AdamW.

Source:
    Zheng et al. 2017, "Asynchronous Stochastic Gradient Descent with Delay Compensation", DC-ASGD-a.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_distributed.comm.base import Communicator, Parts
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.parallel.adamw import STEP, DistributedAdamW
from mlx_distributed.train.pending import Pending
from mlx_distributed.train.phases import Phases, Work
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo


def steps(phases: Phases, state: TrainState, comm: Communicator) -> Iterator[StepInfo]:
    """The steps of a run, or of the rest of one; `state.pending` are the gradients of the next update."""
    strength, num_steps = phases.config.parallel.delay_compensation, phases.plan.num_steps
    left_over = state.pending  # When it was computed, somebody may have wanted to stop: that has been done.
    while state.step < num_steps:
        start_s, before = time.monotonic(), replace(comm.traffic)
        work = phases.work(state.step)
        if state.pending is None:  # The first step of a run: nothing travels yet.
            state.pending = _begin(phases, state, work, phases.compute(state, work, comm), comm)
        ahead = phases.work(state.step + 1) if state.step + 1 < num_steps else None
        parts = list(phases.compute(state, ahead, comm)) if ahead else []
        computed_s = time.monotonic()
        current = state.parameters if strength else None  # A second copy of them, once they have moved on.
        sums, then = dict(state.pending.sums), state.pending.computed_at
        stop_counts = state.pending is not left_over
        comm_exposed_s = time.monotonic() - computed_s
        reduced = phases.reduced(state, work, sums)
        reduced.tally.stop = reduced.tally.stop and stop_counts
        state.pending = None
        if current and then and not reduced.skipped and state.optimizer[STEP].item():
            reduced.gradients = compensated(
                reduced.gradients, reduced.scale, current, then, state.optimizer, phases.optimizer, strength
            )
            reduced.scale = mx.array(1.0)
        phases.commit(state, work.step, reduced, comm)
        if ahead:
            state.pending = _begin(phases, state, ahead, parts, comm, current)
            if reduced.tally.stop or phases.looked_at(state.step):
                state.pending.settle(state.feedback)
        del parts, current, then, sums
        yield reduced.info(
            step=state.step,
            learning_rate=phases.rate(work.step),
            step_s=time.monotonic() - start_s,
            comm_s=comm.traffic.reduce_s - before.reduce_s,
            comm_exposed_s=comm_exposed_s,
            sent_bytes=comm.traffic.sent_bytes - before.sent_bytes,
        )


def compensated(
    gradients: Arrays,
    scale: mx.array,
    now: Arrays,
    then: Arrays,
    moments: Arrays,
    optimizer: DistributedAdamW,
    strength: float,
) -> Arrays:
    """Gradients as they would be, to first order, of the parameters as they are now.

    Args:
        gradients: sums, emptied on the way.
        scale: that every gradient is multiplied by.
        now: parameters.
        then: those that the gradients were computed at.
        moments: state of the optimizer before the update.
        optimizer: whose state it is.
        strength: the paper's lambda before it is divided; at least 0.

    Returns:
        Scaled and corrected gradients, evaluated.
    """
    unbiased = 1 - optimizer.betas[1] ** moments[STEP]
    corrected: Arrays = {}
    for name in list(gradients):
        gradient = gradients.pop(name) * scale
        root = mx.sqrt(moments[f"{name}.v"] / unbiased) + optimizer.eps
        drift = now[name] - then[name]
        corrected[name] = (gradient + strength * mx.square(gradient) / root * drift).astype(mx.float32)
        mx.eval(corrected[name])  # One after the other: together they would be several copies of the model.
    return corrected


def _begin(
    phases: Phases,
    state: TrainState,
    work: Work,
    parts: Iterable[Parts],
    comm: Communicator,
    computed_at: Arrays | None = None,
) -> Pending:
    accepts = lambda sums: phases.reduced(state, work, dict(sums)).skipped is None  # noqa: E731
    return Pending(phases.start(state, work, iter(parts), comm), computed_at, accepts)
