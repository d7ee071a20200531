"""The step of a sharded optimizer: what a rank does with the slices of the gradients that it owns.

Where every rank updates everything, the owner of a slice sends the sum of its gradients to all. Here it updates that
slice of the parameters and sends those instead, so as many bytes travel, and the moments of a slice are nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BLOCK, Arrays, BucketLayout, from_buckets
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.adamw import MOMENTS, STEP, DistributedAdamW, decaying
from mlx_distributed.parallel.shard import Part
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


class Update:
    """One update of sharded parameters.

    Args:
        optimizer: whose update it is.
        state: of before.
        scale: that every gradient is multiplied by.
        learning_rate: of this step.
    """

    def __init__(self, optimizer: DistributedAdamW, state: TrainState, scale: mx.array, learning_rate: float) -> None:
        self._optimizer, self._parameters, self._num_updates = optimizer, state.parameters, state.optimizer[STEP]
        self._scale, self._learning_rate = scale, learning_rate

    def exchange(
        self, own: Part, gradients: Arrays, layout: Sequence[BucketLayout], what: str, comm: Communicator
    ) -> Arrays:
        """New parameters, whole: every rank updates the segments that it owns and gives them to all.

        Args:
            own: of this rank; its moments stay as they are.
            gradients: of its segments, which stay too.
            layout: of the gradients; parameters travel exactly, whatever its wire format.
            what: names the parameters in errors.
            comm: over which the segments are exchanged.

        Raises:
            CommError: a peer was lost.
        """
        updated: Arrays = {}
        moments = dict(own.moments)
        for group in self._groups(own, dict(gradients), moments):
            mx.eval(group)
            updated |= group
            for name in _moments_of(group):  # `settle` computes them: old and new ones would take twice the memory.
                del moments[name]
            del group  # The last one would outlive `updated`.
        slices = own.shard.join(updated)
        mx.eval(slices)
        exact = [replace(bucket, wire="fp32") for bucket in layout]
        return from_buckets(layout, comm.all_gather_slices(exact, slices, what))

    def settle(self, part: Part, gradients: Arrays) -> None:
        """Bring the moments of a part to where the update leads; `gradients` is emptied on the way."""
        for group in self._groups(part, gradients, part.moments):
            mx.eval([part.moments[name] for name in _moments_of(group)])

    def _groups(self, part: Part, gradients: Arrays, moments: Arrays) -> Iterator[Arrays]:
        """The new segments of a part, group by group, not yet evaluated."""
        whole, moments[STEP] = self._parameters, self._num_updates
        yield from self._optimizer.update(
            part.shard.cut(whole), gradients, moments, self._scale, self._learning_rate, decaying(whole)
        )
        del moments[STEP]


def take(state: TrainState, parameters: Arrays, num_tokens: int) -> None:
    """Take new parameters, whole: the end of a step whose moments have been settled, or let go of."""
    state.optimizer[STEP] = state.optimizer[STEP] + 1
    mx.eval(state.optimizer)
    state.take([parameters], num_tokens)


def _moments_of(names: Iterable[str]) -> list[str]:
    return [f"{name}.{moment}" for name in names for moment in MOMENTS]
