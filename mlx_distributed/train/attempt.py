"""`Attempt`: a step that is taken by a group whose members may change before it is done.

What this rank has computed is kept until the step is committed. If a member is lost, the others keep theirs, take over
what is missing, and add up anew: the sum is along the same tree, so its bits are those of an undisturbed step.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator, LocalComm, Parts
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.tree_sum import Node
from mlx_distributed.train.phases import Phases, Reduced
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

_BLOCK_WORDS = 1 << 12


class Attempt:
    """One step, from its first gradient to its commit.

    Args:
        phases: of the run.
        state: that the step is taken from; changed by `commit` alone.
    """

    divisible = True
    """Of what this rank holds, it can put in a part."""

    def __init__(self, phases: Phases, state: TrainState) -> None:
        assert state.inner is None
        self._phases, self._state = phases, state
        self._work = phases.work(state.step)
        self._sums = phases.begin(state, self._work)
        self.sums: Arrays = {}
        """Over all ranks, the tally among them, as soon as they are there."""
        self.digest = ""
        """Of these sums."""
        self._reduced: Reduced | None = None
        self._begun_s = time.monotonic()
        self._num_computed = 0
        self._compute_s = self._comm_s = self._exposed_s = 0.0
        self._sent_bytes = 0

    @property
    def num_leaves(self) -> int:
        """Micro-batches of the step."""
        return len(self._work.microbatches)

    @property
    def held(self) -> tuple[Node, ...]:
        """Partial sums that this rank has."""
        return tuple(sorted(self._sums.nodes))

    @property
    def speed(self) -> float:
        """Micro-batches per second that this rank has computed; 0 where there were none."""
        return self._num_computed / self._compute_s if self._num_computed else 0.0

    def keep(self, nodes: Collection[Node]) -> None:
        """Forget every other partial sum: another rank puts it in."""
        kept = np.zeros(self.num_leaves, bool)
        for node in nodes:
            kept[slice(*node)] = True
        for tree in self._sums.trees:
            for node in tree.parts.keys() - set(nodes):
                del tree.parts[node]
        self._sums.tally.losses[~kept] = 0.0
        self._sums.tally.num_tokens[~kept] = 0

    def reduce(self, leaves: Sequence[int], comm: Communicator) -> str:
        """Compute micro-batches, add up what all ranks hold, and give a digest of the sums, the same on every rank.

        Raises:
            CommError: what was computed until then is held.
        """
        begun_s, compute_s = time.monotonic(), self._compute_s
        reduce_s, sent_bytes = comm.traffic.reduce_s, comm.traffic.sent_bytes
        self.sums = self._reduce(leaves, comm)
        self._comm_s += comm.traffic.reduce_s - reduce_s
        self._sent_bytes += comm.traffic.sent_bytes - sent_bytes
        self._exposed_s += time.monotonic() - begun_s - (self._compute_s - compute_s)
        self.digest = quick_digest(self.sums)
        return self.digest

    def settle(self) -> None:
        """Work out what follows from the sums, while the others vote."""
        self._reduced = self._phases.reduced(self._state, self._work, dict(self.sums))

    def commit(self) -> StepInfo:
        """Take the step. Touches no other machine."""
        for tree in self._sums.trees:
            tree.parts.clear()
        return self._take().info(
            step=self._state.step,
            learning_rate=self._phases.rate(self._work.step),
            step_s=time.monotonic() - self._begun_s,
            comm_s=self._comm_s,
            comm_exposed_s=self._exposed_s,
            sent_bytes=self._sent_bytes,
        )

    def _reduce(self, leaves: Sequence[int], comm: Communicator) -> Arrays:
        sums = self._phases.start(self._state, self._work, self._computed(leaves, comm), comm)()
        self._reduced = None
        return sums

    def _take(self) -> Reduced:
        if self._reduced is None:
            self.settle()
        reduced, self.sums = self._reduced, {}  # The update lets go of them one by one.
        assert reduced is not None
        self._phases.commit(self._state, self._work.step, reduced, LocalComm())
        return reduced

    def _computed(self, leaves: Sequence[int], comm: Communicator) -> Iterator[Parts]:
        """By bucket, what this rank holds when these micro-batches are computed; takes the time."""
        what = f"all_reduce of the gradients of step {self._work.step + 1}"
        parts = self._phases.add(self._state, self._work, self._sums, leaves, lambda: comm.check(what), keep=True)
        while True:
            start_s = time.monotonic()
            try:
                bucket = next(parts)
            except StopIteration:
                self._num_computed += len(leaves)
                return
            finally:
                self._compute_s += time.monotonic() - start_s
            yield bucket


def quick_digest(arrays: Arrays) -> str:
    """16 hexadecimal digits that differ where arrays of the same names and shapes differ by mistake.

    64-bit sums of the words of each block, and of those sums, each times an odd number of its place: at the speed of
    memory, where a SHA-256 would take a twentieth of a step.
    """
    total = 0
    mx.eval(arrays)  # All at once: to evaluate one costs 50 us, however small it is.
    for place, name in enumerate(sorted(arrays)):
        data = np.asarray(arrays[name]).reshape(-1).view(np.uint8)
        whole = data.size // 8 * 8
        words = np.concatenate([data[whole:], np.zeros(-data.size % 8, np.uint8)]).view(np.uint64)
        blocks = data[:whole].view(np.uint64)
        full = blocks.size // _BLOCK_WORDS * _BLOCK_WORDS
        sums = np.concatenate([blocks[:full].reshape(-1, _BLOCK_WORDS).sum(axis=1), blocks[full:], words])
        odd = np.arange(1, 2 * sums.size, 2, dtype=np.uint64)
        total += (2 * place + 1) * int((sums * odd).sum())
    return f"{total % 2**64:016x}"
