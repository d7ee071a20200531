"""The step of a sharded optimizer: what a rank does with the slices of the gradients that it owns.

Where every rank updates everything, the owner of a slice sends the sum of its gradients to all. Here it updates that
slice of the parameters and sends those instead, so as many bytes travel, and the moments of a slice are nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BLOCK, Arrays, BucketLayout, from_buckets
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.adamw import MOMENTS, DistributedAdamW, decaying
from mlx_distributed.train.loss import block_sums
from mlx_distributed.train.state import TrainState


def gather_block_sums(
    layout: Sequence[BucketLayout], slices: Sequence[mx.array], what: str, comm: Communicator
) -> list[mx.array]:
    """`block_sums` of every bucket, in order and in pieces, given this rank's flat slices.

    Raises:
        CommError: a peer is lost, or gave something else.
    """
    own = [block_sums([flat]) for flat in slices]
    for sums in own:
        mx.eval(sums)
    gathered = comm.all_gather(mx.concatenate(own), what)
    pieces = [[-(-(stop - start) // BLOCK) for start, stop in owned] for owned in comm.slices(layout)]
    for rank, sums in enumerate(gathered):
        due = sum(bucket[rank] for bucket in pieces)
        if sums.shape != (due,) or sums.dtype != mx.float32:
            reason = f"sent {sums.dtype}{tuple(sums.shape)} where {due} sums of squares were due"
            raise CommError(f"all_gather of {what}", rank, comm.generation, 0.0, reason)
    ordered, at = [], [0] * comm.size
    for bucket in pieces:
        for rank, num_blocks in enumerate(bucket):
            ordered.append(gathered[rank][at[rank] : at[rank] + num_blocks])
            at[rank] += num_blocks
    return ordered


def commit(
    state: TrainState,
    optimizer: DistributedAdamW,
    layout: Sequence[BucketLayout],
    gradients: Arrays,
    scale: mx.array,
    learning_rate: float,
    num_tokens: int,
    comm: Communicator,
) -> None:
    """Take the step: update the segments that this rank owns, exchange them, and only then change the state.

    Args:
        state: of a shard.
        optimizer: whose update it is.
        layout: of the gradients; parameters travel exactly, whatever its wire format.
        gradients: segments, emptied on the way.
        scale: that every gradient is multiplied by.
        learning_rate: of this step.
        num_tokens: label tokens of this step.
        comm: over which the segments are exchanged.

    Raises:
        CommError: a peer was lost; the state is as before.
    """
    assert state.shard is not None
    own = partial(_updates, state, optimizer, scale, learning_rate)
    updated: Arrays = {}
    moments = dict(state.optimizer)
    for group in own(dict(gradients), moments):
        mx.eval(group)
        updated |= group
        for name in _moments_of(group):  # They are computed again below: old and new ones would take twice the memory.
            del moments[name]
    slices = state.shard.join(updated)
    mx.eval(slices)
    exact = [replace(bucket, wire="fp32") for bucket in layout]
    buckets = comm.all_gather_slices(exact, slices, f"the parameters of step {state.step + 1}")
    del slices
    for group in own(gradients, state.optimizer):
        mx.eval([state.optimizer[name] for name in _moments_of(group)])
    mx.eval(state.optimizer)
    state.take([from_buckets(layout, buckets)], num_tokens)


def _updates(
    state: TrainState,
    optimizer: DistributedAdamW,
    scale: mx.array,
    learning_rate: float,
    gradients: Arrays,
    moments: Arrays,
) -> Iterator[Arrays]:
    """The new segments of this rank, group by group, not yet evaluated."""
    assert state.shard is not None
    whole = state.parameters
    return optimizer.update(state.shard.cut(whole), gradients, moments, scale, learning_rate, decaying(whole))


def _moments_of(names: Iterable[str]) -> list[str]:
    return [f"{name}.{moment}" for name in names for moment in MOMENTS]
