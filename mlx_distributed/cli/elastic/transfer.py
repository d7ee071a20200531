"""The state of training as other workers can have it, and taken over from them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.elastic.protocol import Outcome
from mlx_distributed.elastic.recovery import Layout, Received, layout_of
from mlx_distributed.elastic.snapshots import Snapshot
from mlx_distributed.errors import CheckpointError
from mlx_distributed.train.attempt import quick_digest
from mlx_distributed.train.attempts import empty_sums, replay
from mlx_distributed.train.mirrors import forget
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.rounds import begin_anew
from mlx_distributed.train.state import TrainState

_PARAMETERS, _OPTIMIZER = "parameters/", "optimizer/"


def views(arrays: Arrays) -> dict[str, np.ndarray]:
    """What is in the memory of MLX, as bytes that another thread may read: nothing is copied that lies in one piece."""
    mx.eval(arrays)  # All at once: to evaluate one costs 50 us, however small it is.
    return {name: np.asarray(np.asarray(array), order="C") for name, array in arrays.items()}


def snapshot_of(state: TrainState, outcome: Outcome) -> Snapshot:
    """What another worker needs to have the same state."""
    counters = {"step": state.step, "num_tokens": state.num_tokens, "num_skipped": state.num_skipped}
    arrays = {_PARAMETERS + name: array for name, array in state.parameters.items()}
    arrays |= {_OPTIMIZER + name: array for name, array in state.shared.items()}
    return Snapshot(outcome, counters, views(arrays))


def sums_layout(phases: Phases, state: TrainState, number: int) -> Layout:
    """Of the sums of a commit, counted from 1."""
    return layout_of(views(empty_sums(phases, state, number - 1)))


def take(phases: Phases, state: TrainState, own: Outcome, received: Received) -> Outcome:
    """Take over a state, and the steps that others have taken since; what it is the state of then.

    Args:
        phases: of the run.
        state: that is replaced.
        own: what it is the state of before.
        received: from other workers.
    """
    reached = own
    if (snapshot := received.state) is not None:
        try:
            _restore(phases, state, snapshot)
        except CheckpointError:  # It has been compared with ours on the way, and fits.
            raise AssertionError("a state that does not fit") from None
        reached = snapshot.outcome
    for outcome, arrays in received.later:
        sums = {name: mx.array(array) for name, array in arrays.items()}
        if quick_digest(sums) != outcome.digest:
            break  # What others have taken is something else; the next attempt begins with a newer state.
        replay(phases, state, sums)
        reached = outcome
    return reached


def _restore(phases: Phases, state: TrainState, snapshot: Snapshot) -> None:
    parameters, optimizer = (
        {name.removeprefix(kind): mx.array(array) for name, array in snapshot.arrays.items() if name.startswith(kind)}
        for kind in (_PARAMETERS, _OPTIMIZER)
    )
    counters = snapshot.counters
    if state.parts:
        forget(state)
    state.restore(parameters, optimizer, counters["step"], counters["num_tokens"], counters["num_skipped"])
    state.metrics = {}
    if state.inner is not None:
        begin_anew(phases, state)
