"""`ShardedAttempt`: a step of a sharded optimizer that is taken by a group whose members may change before it is done.

A commit touches no other machine, so all that is exchanged is exchanged before: the sums that the members vote on are
the new parameters. Moments change with the commit, on their owner and on its mirror.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.parallel.shard import Part
from mlx_distributed.train.attempt import Attempt
from mlx_distributed.train.mirrors import forget, mirrored
from mlx_distributed.train.phases import Reduced
from mlx_distributed.train.sharded import Update, take
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.tally import PREFIX, Tally

_SKIPPED = PREFIX + "skipped"


class ShardedAttempt(Attempt):
    """As `Attempt`, of a state whose moments `mirrors.spread` has brought to where they belong in the group."""

    _update: Update
    _changing: Sequence[tuple[Part, Arrays]] = ()
    """Parts of the moments, and the gradients that will change them."""

    def settle(self) -> None:
        """Nothing is left to do before the commit."""

    def _reduce(self, leaves: Sequence[int], comm: Communicator) -> Arrays:
        state, phases, work = self._state, self._phases, self._work
        reduced = phases.reduce(state, work, self._computed(leaves, comm), comm)
        parameters = state.parameters
        changing: list[tuple[Part, Arrays]] = []
        if not reduced.skipped:
            what, layout = f"step {work.step + 1}", phases.layout(state)
            of_mirrors = mirrored(state, reduced.gradients, f"the gradients of {what}", comm)
            update = phases.update(state, work.step, reduced)
            (own, *mirrors), gradients = state.parts, reduced.gradients
            parameters = update.exchange(own, gradients, layout, f"the parameters of {what}", comm)
            changing = [(own, gradients), *zip(mirrors, of_mirrors, strict=True)]
            self._update = update
        self._changing, self._reduced = changing, reduced
        return parameters | reduced.tally.part((0, self.num_leaves)) | mark(bool(reduced.skipped))

    def _take(self) -> Reduced:
        state, reduced, sums = self._state, self._reduced, self.sums
        self.sums = {}
        assert reduced is not None
        for part, gradients in self._changing:
            self._update.settle(part, gradients)
        if not reduced.skipped:
            state.parts = [part for part, _ in self._changing]
        _apply(state, sums)
        return reduced


def replay(state: TrainState, sums: Arrays) -> None:
    """Take a step as others have taken it. The moments are let go: `mirrors.spread` gives newer ones."""
    forget(state)
    _apply(state, sums)


def _apply(state: TrainState, sums: Arrays) -> None:
    tally, skipped = Tally.pop(sums), sums.pop(_SKIPPED).item()
    if skipped:
        state.skip(overflow=tally.first_not_finite() is None)
    else:
        take(state, sums, tally.total_tokens)


def mark(skipped: bool) -> Arrays:
    """What is told beside new parameters: a step that was skipped has left the old ones."""
    return {_SKIPPED: mx.array([int(skipped)], mx.int64)}
