"""What lossy wire formats have left out, on its way into a checkpoint and back: all that ranks do not share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays, BucketLayout, from_buckets, to_buckets
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.errors import CheckpointError

_TAG, _WHAT = 1, "what compression has left out"


def give(feedback: Feedback, layout: Sequence[BucketLayout], comm: Communicator) -> None:
    """Hand what this rank is owed to rank 0, which calls `collect`."""
    if layout[0].lossy:
        for array in _arrays(feedback, layout).values():
            comm.send(array, 0, _TAG, _WHAT)


def collect(feedback: Feedback, layout: Sequence[BucketLayout], comm: Communicator) -> Iterator[Arrays]:
    """On rank 0: what each rank is owed, in rank order and one rank at a time, named as the gradients are."""
    if layout[0].lossy:
        yield (own := _arrays(feedback, layout))
        for rank in range(1, comm.size):
            yield {name: comm.recv(rank, _TAG, _WHAT) for name in own}


def hand_out(
    feedback: Feedback, layout: Sequence[BucketLayout], saved: Sequence[Callable[[], Arrays]], comm: Communicator
) -> None:
    """Give every rank what it was owed; where there are now more or fewer ranks, rank 0 takes all of it.

    Args:
        feedback: of this rank, is replaced.
        layout: of the gradients.
        saved: on rank 0, what loads that of each rank, in rank order; the others give nothing.
        comm: over which it is handed out.

    Raises:
        CheckpointError: something saved does not fit the gradients.
    """
    if not layout[0].lossy:
        return
    num_saved = comm.broadcast(mx.array(len(saved)), 0, _WHAT).item()
    if comm.rank == 0:
        for rank, load in enumerate(saved):
            arrays = load()
            _check(arrays, layout)
            if num_saved != comm.size or rank == 0:
                _add(feedback, layout, arrays)
            else:
                for leaf in (leaf for bucket in layout for leaf in bucket.leaves):
                    comm.send(arrays[leaf.name], rank, _TAG, _WHAT)
    elif num_saved == comm.size:
        names = [leaf.name for bucket in layout for leaf in bucket.leaves]
        _add(feedback, layout, {name: comm.recv(0, _TAG, _WHAT) for name in names})


def _arrays(feedback: Feedback, layout: Sequence[BucketLayout]) -> Arrays:
    flat = (feedback.owed(index, bucket.size) for index, bucket in enumerate(layout))
    return from_buckets(layout, [bucket.unpack(values) for bucket, values in zip(layout, flat, strict=True)])


def _add(feedback: Feedback, layout: Sequence[BucketLayout], arrays: Arrays) -> None:
    for index, (bucket, values) in enumerate(zip(layout, to_buckets(layout, arrays), strict=True)):
        feedback.residual[index] = feedback.owed(index, bucket.size) + bucket.pack(values)


def _check(arrays: Arrays, layout: Sequence[BucketLayout]) -> None:
    expected = {leaf.name: leaf.shape for bucket in layout for leaf in bucket.leaves}
    found = {name: tuple(array.shape) for name, array in arrays.items() if array.dtype == mx.float32}
    if found != expected:
        raise CheckpointError(f"{_WHAT} does not fit the gradients: it was saved for other parameters")
