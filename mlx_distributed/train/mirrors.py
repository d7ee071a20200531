"""Moments that outlive their owner: in an elastic run with a sharded optimizer every slice of them is on two workers.

The owner of a slice updates its parameters and gives them to all; the rank after it is its mirror, and applies the same
update to the same moments. When members come and go the slices are cut anew: whoever lacks a part of what it is to hold
then gets it from one that has it. Only if an owner and its mirror are lost at once are moments lost.

Source:
    redundant neighbours as in Wang et al. 2023, "GEMINI: Fast Failure Recovery in Distributed Training with In-Memory
    Checkpoints".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays, BucketLayout
from mlx_distributed.errors import CommError, TrainingError
from mlx_distributed.parallel.adamw import MOMENTS, STEP
from mlx_distributed.parallel.shard import Part, Range, Shard
from mlx_distributed.train.state import TrainState

_TAG = 2
_MOMENTS = "the moments"

Slices = tuple[Range, ...]
"""One of each bucket."""


class Move(NamedTuple):
    """Elements of a bucket that one rank gives to another."""

    bucket: int
    start: int
    stop: int
    source: int
    target: int


def wanted_slices(layout: Sequence[BucketLayout], comm: Communicator) -> list[list[Slices]]:
    """By rank of the group: what it owns, and what it mirrors; one alone mirrors nothing."""
    owned = [tuple(bucket[rank] for bucket in comm.slices(layout)) for rank in range(comm.size)]
    return [[owned[rank], owned[rank - 1]] if comm.size > 1 else [owned[rank]] for rank in range(comm.size)]


def plan_moves(held: Sequence[Sequence[Slices]], wanted: Sequence[Sequence[Slices]]) -> list[Move] | None:
    """What must move so that every rank holds what it is to hold; None where nobody holds some of that.

    Args:
        held: by rank, the slices that it has; they may overlap.
        wanted: by rank, the slices that it is to have.
    """
    num_buckets = len(wanted[0][0])
    moves = []
    for bucket in range(num_buckets):
        have = [[slices[bucket] for slices in mine] for mine in held]
        for target, slices in enumerate(wanted):
            for start, stop in (each[bucket] for each in slices):
                at = start
                while at < stop:
                    if (own := _reach(have[target], at)) > at:
                        at = own
                        continue
                    # Those after the target come first, so that not all ask the same rank.
                    others = [(target + i) % len(held) for i in range(1, len(held))]
                    reach, source = max(
                        ((_reach(have[other], at), -place) for place, other in enumerate(others)), default=(at, 0)
                    )
                    if reach <= at:
                        return None
                    until = min([reach, stop, *(first for first, _ in have[target] if first > at)])
                    moves.append(Move(bucket, at, until, others[-source], target))
                    at = until
    return moves


def spread(state: TrainState, layout: Sequence[BucketLayout], comm: Communicator) -> None:
    """Bring the moments to where they belong in this group. All of its members have taken the same steps.

    Args:
        state: of this rank, which holds whatever moments it has, or none.
        layout: of the gradients.
        comm: the group.

    Raises:
        CommError: a peer was lost; this rank holds at least what it held before.
        TrainingError: nobody holds some of the moments.
    """
    wanted = wanted_slices(layout, comm)
    if not state.optimizer[STEP].item():  # All are zero, so nobody needs to be asked.
        state.parts = [Part.zeros(layout, slices) for slices in wanted[comm.rank]]
        return
    had = [part for part in state.parts if part.shard.slices]
    moves = plan_moves(_all_held(had, len(layout), comm), wanted)
    if moves is None:
        raise TrainingError(
            "a part of the optimizer's moments is lost: with optimizer.shard every part is on two workers, and both "
            "were lost at once; --resume goes on from the last checkpoint"
        )
    got = _exchange(had, moves, comm)
    parts = [_part(layout, slices, had, got) for slices in wanted[comm.rank]]
    # Nobody lets go of anything before all have what they need.
    state.parts = [*parts, *had]
    comm.barrier(_MOMENTS)
    state.parts = parts


def forget(state: TrainState) -> None:
    """Let go of all moments: the state is of a later step than they are."""
    state.parts = [Part.zeros([], [])]


def mirrored(state: TrainState, gradients: Arrays, what: str, comm: Communicator) -> list[Arrays]:
    """The summed gradients of what this rank mirrors, which their owner gives, for those that this rank owns.

    Bucket by bucket: no rank gets far ahead of the one before it, so few bytes wait in the transport.

    Args:
        state: whose moments are spread over the group.
        gradients: the segments that this rank owns.
        what: names them in errors.
        comm: the group.

    Raises:
        CommError: a peer was lost, or gave something else.
    """
    (own, *mirrors), flats = state.parts, []
    for mirror in mirrors:
        after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        mine = own.shard.join(dict(gradients))
        mx.eval(mine)
        for flat, (start, stop) in zip(mine, mirror.shard.slices, strict=True):
            comm.send(flat, after, _TAG, what)
            flats.append(_received((stop - start,), before, what, comm))
    return [mirror.shard.split(flats) for mirror in mirrors]


def _reach(ranges: Sequence[Range], at: int) -> int:
    """Up to where, from `at` on, a single range goes; `at` where none has it."""
    return max((stop for start, stop in ranges if start <= at < stop), default=at)


def _all_held(had: Sequence[Part], num_buckets: int, comm: Communicator) -> list[list[Slices]]:
    """What each rank says that it holds."""
    mine = [edge for part in had for slices in part.shard.slices for edge in slices]
    held = []
    for rank, array in enumerate(comm.all_gather(mx.array(mine, mx.int64), _MOMENTS)):
        if array.ndim != 1 or array.dtype != mx.int64 or array.size % (2 * num_buckets):
            raise _refused(rank, f"said with {array.dtype}{tuple(array.shape)} what it holds", _MOMENTS, comm)
        slices = np.asarray(array).reshape(-1, num_buckets, 2).tolist()
        held.append([tuple((start, stop) for start, stop in each) for each in slices])
    return held


def _exchange(had: Sequence[Part], moves: Sequence[Move], comm: Communicator) -> dict[Move, mx.array]:
    """Moments [2, elements] that this rank is given, for those that it gives."""
    got = {}
    for move in moves:
        if move.source == comm.rank:
            comm.send(mx.array(_moments(had, move.bucket, (move.start, move.stop))), move.target, _TAG, _MOMENTS)
        elif move.target == comm.rank:
            got[move] = _received((len(MOMENTS), move.stop - move.start), move.source, _MOMENTS, comm)
    return got


def _received(shape: tuple[int, ...], peer: int, what: str, comm: Communicator) -> mx.array:
    array = comm.recv(peer, _TAG, what)
    if array.shape != shape or array.dtype != mx.float32:
        raise _refused(peer, f"sent {array.dtype}{tuple(array.shape)} where float32{shape} was due", what, comm)
    return array


def _refused(peer: int, reason: str, what: str, comm: Communicator) -> CommError:
    return CommError(f"recv of {what}", peer, comm.generation, 0.0, reason)


def _moments(had: Sequence[Part], bucket: int, wanted: Range) -> np.ndarray:
    """Of elements of a bucket, float32 [2, elements], as far as they are in `had`."""
    moments = np.empty((len(MOMENTS), wanted[1] - wanted[0]), np.float32)
    for part in had:
        at = part.shard.slices[bucket][0]
        for name, (first, last) in part.shard.segments[bucket].items():
            start, stop = max(at, wanted[0]), min(at + last - first, wanted[1])
            if start < stop:
                for row, moment in zip(moments, MOMENTS, strict=True):
                    values = np.asarray(part.moments[f"{name}.{moment}"])
                    row[start - wanted[0] : stop - wanted[0]] = values[start - at : stop - at]
            at += last - first
    return moments


def _part(layout: Sequence[BucketLayout], slices: Slices, had: Sequence[Part], got: dict[Move, mx.array]) -> Part:
    """The part that has these slices, of what is here and what others have given."""
    for part in had:
        if part.shard.slices == slices:
            return part
    buckets = []
    for bucket, (start, stop) in enumerate(slices):
        moments = _moments(had, bucket, (start, stop))
        for move, array in got.items():
            if move.bucket == bucket and start <= move.start and move.stop <= stop:
                moments[:, move.start - start : move.stop - start] = np.asarray(array)
        buckets.append(mx.array(moments))
    shard = Shard.of(layout, slices)
    arrays: Arrays = {}
    for row, moment in enumerate(MOMENTS):
        flats = shard.split([moments[row] for moments in buckets])
        arrays |= {f"{name}.{moment}": flat for name, flat in flats.items()}
    mx.eval(arrays)
    return Part(shard, arrays)
