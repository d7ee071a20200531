"""Rounds of an elastic run with `parallel.sync: diloco`: the steps from one exchange to the next, taken or not as one.

Workers train by themselves in between, so it is the exchange that all must agree on. If one is lost in a round, the
others keep their updates, take over the micro-batches that it had not handed over, and exchange without it.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays, from_buckets, make_layout, to_buckets
from mlx_distributed.comm.tree_sum import Node, cover
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.train.attempt import quick_digest
from mlx_distributed.train.diloco import due, take_outer_step
from mlx_distributed.train.outer import NUM_TOKENS, differences, make_fragments, names_of
from mlx_distributed.train.phases import Phases, Work, why_not_finite
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.tally import PREFIX, Tally

_GRAD_NORM = PREFIX + "grad_norm"
_ALONE = LocalComm()


@lru_cache(maxsize=4)
def stops(diloco: DilocoConfig, num_steps: int) -> tuple[int, ...]:
    """The steps after which something is exchanged."""
    return tuple(step for step in range(1, num_steps + 1) if step == num_steps or due(diloco, step) is not None)


def num_taken(phases: Phases, step: int) -> int:
    """Rounds that are over when so many steps have been taken."""
    return bisect_right(_stops(phases), step)


def num_steps(phases: Phases, step: int) -> int:
    """Of the round that ends with a step."""
    place = bisect_left(_stops(phases), step)
    return step - (_stops(phases)[place - 1] if place else 0)


def _stops(phases: Phases) -> tuple[int, ...]:
    return stops(phases.config.parallel.diloco, phases.plan.num_steps)


class _Leaf(NamedTuple):
    """A micro-batch of a round."""

    step: int
    number: int
    """In the step."""


class _Round:
    """What is computed and exchanged in a round, the same on every rank.

    Args:
        phases: of the run.
        parameters: that all agree on.
        first: step of the round that is taken first: where a run goes on from a checkpoint, maybe not its first one.
    """

    def __init__(self, phases: Phases, parameters: Arrays, first: int) -> None:
        self.stop = _stops(phases)[num_taken(phases, first)]
        self.works = {step: phases.work(step) for step in range(first, self.stop)}
        # A range of the leaves is a part of each step and not some steps: few updates with much data learn less.
        order = [
            (index / len(work.microbatches), _Leaf(step, index))
            for step, work in self.works.items()
            for index in range(len(work.microbatches))
        ]
        self.leaves = [leaf for _, leaf in sorted(order, key=lambda item: (item[0], item[1].step))]
        fragments, diloco = make_fragments(parameters, phases.config), phases.config.parallel.diloco
        self.due = due(diloco, self.stop)
        at_end = self.stop == phases.plan.num_steps
        self.fragments = {number: fragment for number, fragment in enumerate(fragments) if at_end or number == self.due}
        self.first_bucket = sum(map(len, fragments[: min(self.fragments)]))

    def empty_sums(self, parameters: Arrays) -> Arrays:
        """Of the names, dtypes and shapes of what is summed."""
        sums = {name: parameters[name] for fragment in self.fragments.values() for name in names_of(fragment)}
        sums |= {_tokens(number): mx.zeros(1, mx.int64) for number in self.fragments}
        tally = Tally.empty(len(self.leaves)).part((0, 0))
        return sums | tally | {_GRAD_NORM: mx.zeros(len(self.leaves))}


class RoundAttempt:
    """A round that is being taken; the calls are those of `attempt.Attempt`.

    Args:
        phases: of the run.
        state: that the round is taken from; until `commit` only this rank's own copy changes.
    """

    divisible = False
    """A copy that was trained on some micro-batches cannot be without the half of them."""

    def __init__(self, phases: Phases, state: TrainState) -> None:
        assert state.inner is not None
        self._phases, self._state, self._inner = phases, state, state.inner
        self._round = _Round(phases, state.parameters, state.step)
        self._tally = Tally.empty(self.num_leaves)
        self._grad_norms = np.zeros(self.num_leaves, np.float32)
        self._trained: set[int] = set()
        self.sums: Arrays = {}
        """Over all ranks, as soon as they are there."""
        self.digest = ""
        """Of these sums."""
        self._begun_s = time.monotonic()
        self._compute_s = self._comm_s = self._exposed_s = 0.0
        self._sent_bytes = 0

    @property
    def num_leaves(self) -> int:
        """Micro-batches of the round."""
        return len(self._round.leaves)

    @property
    def held(self) -> tuple[Node, ...]:
        """What this rank's copy was trained on in this round."""
        edges = [leaf for leaf in range(self.num_leaves + 1) if (leaf in self._trained) != (leaf - 1 in self._trained)]
        ranges = zip(edges[::2], edges[1::2], strict=True)
        return tuple(node for start, stop in ranges for node in cover(start, stop, self.num_leaves))

    @property
    def speed(self) -> float:
        """Micro-batches per second that this rank has trained on; 0 where there were none."""
        return len(self._trained) / self._compute_s if self._trained else 0.0

    def keep(self, nodes: Collection[Node]) -> None:
        """Where that is not all that this rank holds, others hold the same: it begins anew with what all agree on."""
        if set(nodes) != set(self.held):
            begin_anew(self._phases, self._state)
            self._tally = Tally.empty(self.num_leaves)
            self._grad_norms[:] = 0.0
            self._trained.clear()

    def reduce(self, leaves: Sequence[int], comm: Communicator) -> str:
        """Train on micro-batches, add up how far all copies have moved, and give a digest of the sums, the same on
        every rank.

        Raises:
            CommError: what was trained on until then is held.
        """
        begun_s = time.monotonic()
        try:
            for work, chosen in self._updates(leaves):
                comm.check(f"step {work.step + 1}")
                self._update(work, chosen)
        finally:
            trained_s = time.monotonic()
            self._compute_s += trained_s - begun_s
        reduce_s, sent_bytes = comm.traffic.reduce_s, comm.traffic.sent_bytes
        self.sums = self._exchange(comm)
        self._comm_s += comm.traffic.reduce_s - reduce_s
        self._sent_bytes += comm.traffic.sent_bytes - sent_bytes
        self._exposed_s += time.monotonic() - trained_s
        self.digest = quick_digest(self.sums)
        return self.digest

    def settle(self) -> None:
        """What follows is worked out by `commit`."""

    def commit(self) -> StepInfo:
        """Take the round: bring what all agree on, and this rank's copy, to where the sums lead."""
        sums, self.sums = self.sums, {}
        info = _take(self._phases, self._state, self._round, sums)
        for number in self._round.fragments:
            self._inner.exchanged_at[number] = self._inner.state.num_tokens
        return replace(
            info,
            step_s=time.monotonic() - self._begun_s,
            comm_s=self._comm_s,
            comm_exposed_s=self._exposed_s,
            sent_bytes=self._sent_bytes,
        )

    def _updates(self, leaves: Sequence[int]) -> Iterator[tuple[Work, list[int]]]:
        """Micro-batches of one step that follow each other in it, and their leaves: one update each, step by step."""
        chosen = sorted(leaves, key=lambda leaf: self._round.leaves[leaf])
        at = 0
        for end in range(1, len(chosen) + 1):
            first, last = self._round.leaves[chosen[at]], self._round.leaves[chosen[end - 1]]
            following = self._round.leaves[chosen[end]] if end < len(chosen) else None
            if following != _Leaf(last.step, last.number + 1):
                whole = self._round.works[first.step].microbatches
                yield Work(first.step, whole[first.number : last.number + 1], first.number), chosen[at:end]
                at = end

    def _update(self, work: Work, leaves: Sequence[int]) -> None:
        own, alone = self._inner.state, self._phases.alone
        reduced = alone.reduce(own, work, alone.compute(own, work, _ALONE), _ALONE)
        alone.commit(own, work.step, reduced, _ALONE)
        self._tally.losses[leaves] = reduced.tally.losses
        self._tally.num_tokens[leaves] = reduced.tally.num_tokens
        self._grad_norms[leaves] = reduced.grad_norm
        self._trained.update(leaves)

    def _exchange(self, comm: Communicator) -> Arrays:
        agreed, own = self._state.parameters, self._inner.state
        parts: Arrays = {}
        for number, fragment in self._round.fragments.items():
            num_tokens = own.num_tokens - self._inner.exchanged_at[number]
            parts |= differences(names_of(fragment), agreed, own.parameters, num_tokens)
            parts[_tokens(number)] = parts.pop(NUM_TOKENS)
        mx.eval(parts)
        self._tally.stop = self._phases.stop_requested()
        counts = {_tokens(number): parts[_tokens(number)] for number in self._round.fragments}
        told = self._tally.part((0, self.num_leaves)) | {_GRAD_NORM: mx.array(self._grad_norms)}
        layout = sum(self._round.fragments.values(), ()) + make_layout(counts | told)
        buckets = ({(comm.rank, comm.rank + 1): bucket} for bucket in to_buckets(layout, parts | told))
        what, feedback = f"what is exchanged after step {self._round.stop}", self._state.feedback
        summed = comm.all_reduce(layout, comm.size, buckets, what, feedback.part(self._round.first_bucket))
        return from_buckets(layout, summed)


def empty_sums(phases: Phases, state: TrainState, number: int) -> Arrays:
    """Arrays of the names, dtypes and shapes of the sums of a round, counted from 0."""
    first = max(state.step, _stops(phases)[number - 1] if number else 0)
    return _Round(phases, state.parameters, first).empty_sums(state.parameters)


def replay(phases: Phases, state: TrainState, sums: Arrays) -> None:
    """Take the next round given the sums with which others have taken it; `sums` is emptied."""
    _take(phases, state, _Round(phases, state.parameters, state.step), sums)
    begin_anew(phases, state)


def begin_anew(phases: Phases, state: TrainState) -> None:
    """Let this rank's copy be what all agree on, with an optimizer that has seen nothing."""
    assert state.inner is not None
    own = state.inner.state
    own.model.update(tree_unflatten(list(state.parameters.items())))
    own.optimizer = phases.optimizer.init(own.parameters)
    own.num_tokens = own.num_skipped = 0
    state.inner.exchanged_at = [0] * len(state.inner.exchanged_at)


def _take(phases: Phases, state: TrainState, taken: _Round, sums: Arrays) -> StepInfo:
    """The round as it follows from its sums; the times are left out."""
    grad_norm = float(np.asarray(sums.pop(_GRAD_NORM)).max())
    tally, diloco = Tally.pop(sums), phases.config.parallel.diloco
    for number, fragment in taken.fragments.items():
        of_fragment = {name: sums.pop(name) for name in names_of(fragment)} | {NUM_TOKENS: sums.pop(_tokens(number))}
        # What was learned since the last turn of a fragment is averaged as it is at the end of a run.
        rate, momentum = (diloco.outer_learning_rate, diloco.outer_momentum) if number == taken.due else (1.0, None)
        take_outer_step(state, of_fragment, rate, momentum, mix=0.0)
    state.feedback.commit()
    skipped = None
    for step in taken.works:
        here = [place for place, leaf in enumerate(taken.leaves) if leaf.step == step]
        of_step = Tally(tally.losses[here], tally.num_tokens[here])
        why = why_not_finite(step + 1, of_step, grad_norm if of_step.first_not_finite() is None else 0.0)
        state.num_skipped = state.num_skipped + 1 if why else 0
        state.num_tokens += 0 if why else of_step.total_tokens
        skipped = why or skipped
    state.step, state.metrics = taken.stop, {}
    return StepInfo(
        step=taken.stop,
        loss=tally.mean_loss,
        num_tokens=tally.total_tokens,
        learning_rate=phases.rate(taken.stop - 1),
        grad_norm=grad_norm,
        step_s=0.0,
        comm_s=0.0,
        comm_exposed_s=0.0,
        sent_bytes=0,
        stop_requested=tally.stop,
        skipped=skipped,
        num_steps=len(taken.works),
    )


def _tokens(fragment: int) -> str:
    return f"{NUM_TOKENS}.{fragment}"
