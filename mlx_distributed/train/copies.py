"""A worker's own copy of what is trained (`parallel.sync: diloco`), on its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import CheckpointError
from mlx_distributed.parallel.adamw import STEP
from mlx_distributed.train.checkpoint.segments import COPY
from mlx_distributed.train.state import Inner, TrainState

_PARAMETERS, _OPTIMIZER, _COUNTERS = f"{COPY}parameters/", f"{COPY}optimizer/", f"{COPY}counters"
_TAG = 1
_WHAT = "a worker's own copy"


def named(inner: Inner) -> Arrays:
    """All of it, named as in the file of a rank; `_COUNTERS` are those of the state and then `exchanged_at`, int64."""
    own = inner.state
    arrays = {_PARAMETERS + name: array for name, array in own.parameters.items()}
    arrays |= {_OPTIMIZER + name: array for name, array in own.optimizer.items()}
    counters = [own.step, own.num_tokens, own.num_skipped, *inner.exchanged_at]
    return arrays | {_COUNTERS: mx.array(counters, mx.int64)}


def hand_out(state: TrainState, saved: Sequence[Callable[[], Arrays]], comm: Communicator) -> None:
    """Give every rank the copy to go on with: as many as there are now, its own; more or fewer, the mean of all.

    Args:
        state: with an `inner` that is replaced.
        saved: on rank 0, what loads the copy of each rank of the group that saved, named with `COPY`; without any,
            everybody begins with what all agree on.
        comm: over which it is handed out.

    Raises:
        CheckpointError: a copy does not fit the parameters.
    """
    inner = state.inner
    assert inner is not None
    num_saved = comm.broadcast(mx.array(len(saved)), 0, _WHAT).item()
    names = sorted(named(inner))
    if not num_saved:
        inner.state.model.update(tree_unflatten(list(state.parameters.items())))
    elif num_saved == comm.size:
        for rank in range(1, comm.size if comm.rank == 0 else 1):
            arrays = _checked(saved[rank](), inner)
            for name in names:
                comm.send(arrays[name], rank, _TAG, _WHAT)
        mine = _checked(saved[0](), inner) if comm.rank == 0 else None
        _take(inner, mine or {name: comm.recv(0, _TAG, _WHAT) for name in names})
    else:
        mean = _mean([_checked(load(), inner) for load in saved], comm.size) if comm.rank == 0 else {}
        _take(inner, {name: comm.broadcast(mean.get(name), 0, _WHAT) for name in names})


def _take(inner: Inner, arrays: Arrays) -> None:
    own = inner.state
    parameters = {name: arrays[_PARAMETERS + name] for name in own.parameters}
    own.model.update(tree_unflatten(list(parameters.items())))
    own.optimizer = {name: arrays[_OPTIMIZER + name] for name in own.optimizer}
    own.step, own.num_tokens, own.num_skipped, *inner.exchanged_at = np.asarray(arrays[_COUNTERS]).tolist()
    mx.eval(own.parameters, own.optimizer)


def _checked(arrays: Arrays, inner: Inner) -> Arrays:
    expected, found = (
        {name: (array.dtype, tuple(array.shape)) for name, array in each.items()} for each in (named(inner), arrays)
    )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{_WHAT} does not fit: {name} is {found.get(name, 'missing')} in the checkpoint and "
                f"{expected.get(name, 'missing')} here"
            )
    return arrays


def _mean(copies: Sequence[Arrays], size: int) -> Arrays:
    """The copy that each of `size` workers begins with, where there were more or fewer of them: no step that anybody
    has taken is lost. Weighted by the label tokens that each has trained on, as the sums of fragments are."""
    counters = np.stack([np.asarray(copy[_COUNTERS]) for copy in copies])
    num_tokens = counters[:, 1]
    weights = num_tokens / num_tokens.sum() if num_tokens.any() else np.full(len(copies), 1 / len(copies))
    mean = {}
    for name in copies[0]:
        values = [copy[name] for copy in copies]
        if name == _OPTIMIZER + STEP:
            mean[name] = mx.max(mx.stack(values))
        else:
            mean[name] = sum((w * value for w, value in zip(weights.tolist(), values, strict=True)), mx.zeros(1))
            mean[name] = mean[name].reshape(values[0].shape)
        mx.eval(mean[name])
    # What all of them have trained on since an exchange counts once, spread over those that hand it over.
    since = (num_tokens[:, None] - counters[:, 3:]).sum(axis=0) // size
    own = int(num_tokens.sum()) // size
    mean[_COUNTERS] = mx.array([int(counters[:, 0].max()), own, 0, *(own - since).tolist()], mx.int64)
    return mean
