"""What only one rank has, on its way into a checkpoint and back: its part of the moments, where the optimizer is
sharded, what lossy wire formats have left out of its gradients, and its own copy of what is trained (`copies`). And
what all have, but only for now: sums that are not applied yet.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays, BucketLayout, from_buckets, to_buckets
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models.tensor_file import Arriving
from mlx_distributed.parallel.adamw import MOMENTS, STEP
from mlx_distributed.train import copies, stage_files
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.checkpoint import Checkpoint
from mlx_distributed.train.checkpoint.segments import COPY, FEEDBACK, PENDING, segment_name
from mlx_distributed.train.loss_scale import LOSS_SCALE, LossScale
from mlx_distributed.train.outer import NUM_TOKENS
from mlx_distributed.train.pending import Pending
from mlx_distributed.train.setup import owned_slices
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.tally import PREFIX

_TAG = 1
_FEEDBACK = "what compression has left out"
_MOMENTS = "the moments"
_UNDER_WAY = "the sums that were under way"
_SUMS, _THEN = f"{PENDING}sums/", f"{PENDING}computed-at/"


def missing(state: TrainState, layout: Sequence[BucketLayout], comm: Communicator) -> str | None:
    """In words, of what this group has only a part, so that it cannot be saved."""
    if state.num_stages > comm.size:
        return "the layers (parallel.pipeline)"
    if state.parts and state.parts[0].shard.slices != owned_slices(layout, comm):
        return "the moments (optimizer.shard)"
    return None


def give(state: TrainState, layout: Sequence[BucketLayout], comm: Communicator) -> None:
    """Hand what only this rank has to rank 0, when that asks for it through `collect`. Raises CommError."""
    if comm.rank < _num_files(state, layout, comm):
        stage_files.give(_own(state, layout, comm.rank), comm)


def collect(
    state: TrainState, layout: Sequence[BucketLayout], comm: Communicator
) -> Sequence[Callable[[], Arrays | Arriving]]:
    """On rank 0: what gets, from each rank, what only that has, named as in its file. To be called one after the other,
    in rank order. Empty where all ranks have the same and nothing is under way."""
    loads: list[Callable[[], Arrays | Arriving]] = [partial(_own, state, layout, 0)]
    loads += (partial(stage_files.taken, rank, comm) for rank in range(1, comm.size))
    return loads[: _num_files(state, layout, comm)]


def hand_out(
    state: TrainState, layout: Sequence[BucketLayout], checkpoint: Checkpoint | None, comm: Communicator
) -> None:
    """Give every rank, of what was saved, what only it is to have.

    Args:
        state: of this rank, whose moments and feedback are replaced.
        layout: of the gradients.
        checkpoint: on rank 0, what the run goes on from, if anything; the others give None.
        comm: over which it is handed out.

    Raises:
        CheckpointError: something saved does not fit the parameters.
    """
    if state.parts and comm.broadcast(mx.array(checkpoint is not None), 0, _MOMENTS).item():
        _hand_out_moments(state, checkpoint, comm)
    if _lossy(layout):
        _hand_out_feedback(state.feedback, layout, checkpoint.feedback() if checkpoint else [], comm)
    if state.inner is not None:
        copies.hand_out(state, checkpoint.of_ranks(COPY) if checkpoint else [], comm)
    _hand_out_pending(state, checkpoint.of_ranks(PENDING) if checkpoint else [], comm)


def _num_files(state: TrainState, layout: Sequence[BucketLayout], comm: Communicator) -> int:
    """The first so many ranks have something that others have not; copies of a pipeline all have the same."""
    if state.num_stages > 1:
        return state.num_stages
    if state.parts or state.inner is not None or _lossy(layout):
        return comm.size
    return 0 if state.pending is None else 1


def _lossy(layout: Sequence[BucketLayout]) -> bool:
    return any(bucket.lossy for bucket in layout)


def _own(state: TrainState, layout: Sequence[BucketLayout], rank: int) -> Arrays:
    """What only this rank has, named as in its file. Of a pipeline, what rank 0 has is in the files that all share."""
    arrays: Arrays = {}
    if state.pending is not None and rank == 0:
        arrays |= _pending(state.pending)
    if state.num_stages > 1 and rank > 0:
        arrays |= stage_files.named(state)
    if state.parts:
        own = state.parts[0]
        for name, (start, _) in own.shard.ranges.items():
            for moment in (f"{name}.{kind}" for kind in MOMENTS):
                arrays[segment_name(moment, start)] = own.moments[moment]
    if _lossy(layout):
        arrays |= {FEEDBACK + name: array for name, array in _owed(state.feedback, layout).items()}
    if state.inner is not None:
        arrays |= copies.named(state.inner)
    return arrays


def _pending(pending: Pending) -> Arrays:
    """What is under way, the same on every rank, named as in the file of rank 0."""
    then = pending.computed_at or {}
    return {_SUMS + name: array for name, array in pending.sums.items()} | {_THEN + n: a for n, a in then.items()}


def _hand_out_moments(state: TrainState, checkpoint: Checkpoint | None, comm: Communicator) -> None:
    """Array by array, of which every rank keeps its segment, so that nobody holds all of them."""
    own = state.parts[0]
    kinds = {name: (array.dtype, tuple(array.shape)) for name, array in state.shared.items()}
    for name, array in state.parameters.items():
        kinds |= {f"{name}.{moment}": (mx.float32, tuple(array.shape)) for moment in MOMENTS}
    ranges = {f"{name}.{moment}": owned for name, owned in own.shard.ranges.items() for moment in MOMENTS}
    saved: Iterable[tuple[str, mx.array | None]]
    saved = checkpoint.optimizer() if checkpoint else ((name, None) for name in sorted(kinds))
    for name, found in itertools.zip_longest(sorted(kinds), saved):
        if name is None or found is None or found[0] != name or not _fits(found[1], kinds[name]):
            raise CheckpointError(f"{_MOMENTS} do not fit: they were saved for other parameters")
        whole = comm.broadcast(found[1], 0, f"{_MOMENTS}, {name}")
        if name == STEP:
            state.optimizer[name] = whole
        elif name == LOSS_SCALE:
            state.loss_scale = LossScale.of(whole)
        elif name in ranges:
            # Through numpy, as a view would keep the whole in memory.
            own.moments[name] = mx.array(np.asarray(whole).reshape(-1)[slice(*ranges[name])])
        comm.barrier(_MOMENTS)  # Or rank 0 would read ahead of what the network can take.


def _fits(array: mx.array | None, kind: tuple[mx.Dtype, tuple[int, ...]]) -> bool:
    """Whether an array is of a dtype and shape; where there is none, another rank has looked at it."""
    return array is None or (array.dtype, tuple(array.shape)) == kind


def _hand_out_feedback(
    feedback: Feedback, layout: Sequence[BucketLayout], saved: Sequence[Callable[[], Arrays]], comm: Communicator
) -> None:
    """Where there are now more or fewer ranks than in `saved`, rank 0 takes what all of them were owed."""
    num_saved = comm.broadcast(mx.array(len(saved)), 0, _FEEDBACK).item()
    if comm.rank == 0:
        for rank, load in enumerate(saved):
            arrays = load()
            _check_feedback(arrays, layout)
            if num_saved != comm.size or rank == 0:
                _add(feedback, layout, arrays)
            else:
                for leaf in (leaf for bucket in layout for leaf in bucket.leaves):
                    comm.send(arrays[leaf.name], rank, _TAG, _FEEDBACK)
    elif num_saved == comm.size:
        names = [leaf.name for bucket in layout for leaf in bucket.leaves]
        _add(feedback, layout, {name: comm.recv(0, _TAG, _FEEDBACK) for name in names})


def _hand_out_pending(state: TrainState, saved: Sequence[Callable[[], Arrays]], comm: Communicator) -> None:
    arrays = {name: array for load in saved for name, array in load().items()}
    if comm.rank == 0:
        _check_pending(arrays, state)
    names = json.loads(broadcast_bytes(json.dumps(sorted(arrays)).encode(), comm, _UNDER_WAY))
    arrays = {name: comm.broadcast(arrays.get(name), 0, f"{_UNDER_WAY}, {name}") for name in names}
    if arrays:
        sums, then = (
            {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
            for kind in (_SUMS, _THEN)
        )
        state.pending = Pending(lambda: sums, then or None)


def _check_pending(arrays: Arrays, state: TrainState) -> None:
    """Either gradients of all that is trained and their tally, or differences of some of it and their tokens."""
    parameters = {name: (mx.float32, tuple(array.shape)) for name, array in state.parameters.items()}
    found = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
    if not found:
        return
    if state.inner is not None:
        known = {name: kind for name, kind in parameters.items() if _SUMS + name in found}
        sums = known | {NUM_TOKENS: (mx.int64, (1,))}
    else:
        per_microbatch = (arrays[_SUMS + PREFIX + "loss"].size,) if _SUMS + PREFIX + "loss" in arrays else ()
        sums = parameters | {PREFIX + "loss": (mx.float32, per_microbatch), PREFIX + "stop": (mx.int64, (1,))}
        sums[PREFIX + "num_tokens"] = (mx.int64, per_microbatch)
    expected = {_SUMS + name: kind for name, kind in sums.items()}
    if any(name.startswith(_THEN) for name in found):
        expected |= {_THEN + name: kind for name, kind in parameters.items()}
    for name in [*sorted(found), *sorted(expected)]:
        if found.get(name) != expected.get(name):
            raise CheckpointError(f"{_UNDER_WAY} do not fit the parameters: {name} is not one of them")


def _owed(feedback: Feedback, layout: Sequence[BucketLayout]) -> Arrays:
    flat = (feedback.owed(index, bucket.size) for index, bucket in enumerate(layout))
    return from_buckets(layout, [bucket.split(mx.array(values)) for bucket, values in zip(layout, flat, strict=True)])


def _add(feedback: Feedback, layout: Sequence[BucketLayout], arrays: Arrays) -> None:
    for index, (bucket, values) in enumerate(zip(layout, to_buckets(layout, arrays), strict=True)):
        feedback.residual[index] = feedback.owed(index, bucket.size) + bucket.pack(values)


def _check_feedback(arrays: Arrays, layout: Sequence[BucketLayout]) -> None:
    expected = {leaf.name: leaf.shape for bucket in layout for leaf in bucket.leaves}
    found = {name: tuple(array.shape) for name, array in arrays.items() if array.dtype == mx.float32}
    if found != expected:
        raise CheckpointError(f"{_FEEDBACK} does not fit the gradients: it was saved for other parameters")
