"""`parallel.sync: diloco`: workers train by themselves, and agree on parameters now and then (`outer` has the sources).

The micro-batches of a step are cut into as many parts as there are workers. A worker makes an update of its own copy
with each part that it takes, and who is fast takes more of them. After every step a worker tells the others its losses
and hears of theirs, `LAG` steps late, so that nobody waits for one that takes a little longer now and then. Every
`sync_every` steps each fragment of the parameters is exchanged, one after the other, and the sum is applied
`overlap_steps` later: it travels while training goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays, from_buckets, make_layout, to_buckets
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.data import rank_weights, share
from mlx_distributed.train.outer import NUM_TOKENS, differences, make_fragments, names_of, nesterov
from mlx_distributed.train.pending import Pending, finite
from mlx_distributed.train.phases import Phases, Work, why_not_finite
from mlx_distributed.train.state import Inner, TrainState
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.tally import Tally

LAG = 2
"""Steps that a worker may be ahead of what it has heard of the others: evens out updates that take unequally long."""
MIX = 0.5
"""Share of a worker's own copy that stays where a sum comes late, as in the paper on streaming."""

_TAG = 2


def steps(phases: Phases, state: TrainState, comm: Communicator) -> Iterator[StepInfo]:
    """The steps of a run, or of the rest of one. What is yielded is `LAG` steps behind the state, but for where
    somebody will look at the state (`Phases.looked_at`), at the end, and before a stop."""
    worker, recent, stopping = _Worker(phases, state, comm), deque[_Heard](), False
    while state.step < phases.plan.num_steps and not stopping:
        recent.append(worker.take_step())
        worker.exchange()
        keep = LAG
        if phases.looked_at(state.step):
            keep = 0
            worker.settle()
        while len(recent) > keep:
            info = worker.hear(recent.popleft(), recent[0].began if recent else None)
            if info.stop_requested:  # All hear of it at this very step.
                keep, stopping = 0, True
                worker.settle()
            yield replace(info, stop_requested=stopping and not recent)


def due(diloco: DilocoConfig, num_steps: int) -> int | None:
    """The fragment whose differences leave when so many steps have been taken; None where none does."""
    at = (num_steps - 1) % diloco.sync_every + 1
    offsets = [(fragment + 1) * diloco.sync_every // diloco.fragments for fragment in range(diloco.fragments)]
    return offsets.index(at) if num_steps and at in offsets else None


@lru_cache(maxsize=4)
def parts_of(weights: tuple[float, ...], num_steps: int) -> list[list[list[int]]]:
    """By step and rank, which of the parts of a step a rank takes: each goes to whom it leaves the least busy.

    Args:
        weights: the speed of each rank.
        num_steps: after so many the same begins again, so that the number of a step alone tells who takes what.
    """
    taken = [0] * len(weights)
    schedule = []
    for _ in range(num_steps):
        parts: list[list[int]] = [[] for _ in weights]
        for part in range(len(weights)):
            rank = min(range(len(weights)), key=lambda rank: (taken[rank] + 1) / weights[rank])
            taken[rank] += 1
            parts[rank].append(part)
        schedule.append(parts)
    return schedule


@dataclass(frozen=True)
class _Moment:
    """Readings that only go up."""

    time_s: float
    waited_s: float
    reduce_s: float
    sent_bytes: int


@dataclass
class _Heard:
    """What a worker knows of a step."""

    step: int
    began: _Moment
    tally: Tally
    grad_norm: float


class _Worker:
    """One rank of a run."""

    def __init__(self, phases: Phases, state: TrainState, comm: Communicator) -> None:
        config = phases.config
        self._phases, self._state, self._comm, self._diloco = phases, state, comm, config.parallel.diloco
        self._alone = phases.alone
        self._fragments = make_fragments(state.parameters, config)
        weights = tuple(rank_weights(config.parallel.share, comm.size))
        self._parts = [parts[comm.rank] for parts in parts_of(weights, self._diloco.sync_every)]
        self._waited_s = 0.0

    @property
    def _inner(self) -> Inner:
        assert self._state.inner is not None
        return self._state.inner

    def take_step(self) -> _Heard:
        """Compute this rank's parts of a step and tell the others of it."""
        state, comm, own = self._state, self._comm, self._inner.state
        comm.check(f"step {state.step + 1}")
        began = self._moment()
        work = self._phases.work(state.step)
        heard = _Heard(work.step, began, Tally.empty(len(work.microbatches)), 0.0)
        heard.tally.stop = self._phases.stop_requested()
        ranges = share(len(work.microbatches), [1.0] * comm.size)
        for start, stop in (ranges[part] for part in self._parts[state.step % len(self._parts)]):
            if start < stop:
                part = Work(work.step, work.microbatches[start:stop], start)
                reduced = self._alone.reduce(own, part, self._alone.compute(own, part, _ALONE), _ALONE)
                self._alone.commit(own, part.step, reduced, _ALONE)
                heard.tally.losses[start:stop] = reduced.tally.losses
                heard.tally.num_tokens[start:stop] = reduced.tally.num_tokens
                heard.grad_norm = float(np.maximum(heard.grad_norm, reduced.grad_norm))
        state.step += 1
        state.metrics = {}
        for peer in range(comm.size):
            if peer != comm.rank:
                comm.send(_packed(heard), peer, _TAG, _losses(heard.step))
        return heard

    def hear(self, heard: _Heard, end: _Moment | None) -> StepInfo:
        """Wait for what the others say of a step, which ended when the next one began, or just now."""
        with self._waiting():
            for peer in range(self._comm.size):
                if peer != self._comm.rank:
                    self._add(heard, self._comm.recv(peer, _TAG, _losses(heard.step)), peer)
        if not heard.tally.total_tokens:
            others = [peer for peer in range(self._comm.size) if peer != self._comm.rank]
            raise self._refused(heard, others[0], "has no label token of the step, and nobody else has one")
        skipped = why_not_finite(heard.step + 1, heard.tally, heard.grad_norm)
        self._state.num_skipped = self._state.num_skipped + 1 if skipped else 0
        self._state.num_tokens += 0 if skipped else heard.tally.total_tokens
        began, end = heard.began, end or self._moment()
        return StepInfo(
            step=heard.step + 1,
            loss=heard.tally.mean_loss,
            num_tokens=heard.tally.total_tokens,
            learning_rate=self._phases.rate(heard.step),
            grad_norm=heard.grad_norm,
            step_s=end.time_s - began.time_s,
            comm_s=end.reduce_s - began.reduce_s,
            comm_exposed_s=end.waited_s - began.waited_s,
            sent_bytes=end.sent_bytes - began.sent_bytes,
            stop_requested=heard.tally.stop,
            skipped=skipped,
        )

    def exchange(self) -> None:
        """Apply the sum that is due now, hand over the differences that are, and at the end all that there are."""
        state, overlap, outer = self._state, self._diloco.overlap_steps, self._diloco
        rule = outer.outer_learning_rate, outer.outer_momentum
        at_end = state.step == self._phases.plan.num_steps
        if state.pending is not None and (at_end or due(outer, state.step - overlap) is not None):
            self._apply(*rule, mix=0.0 if at_end else MIX)
        fragment = due(outer, state.step)
        if fragment is not None:
            self._hand_over(fragment)
            if not overlap or at_end:
                self._apply(*rule, mix=0.0)
        if at_end:
            # What was learned since is averaged as it is: a push by the momentum would be one for no time at all.
            for fragment in range(len(self._fragments)):
                self._hand_over(fragment)
                self._apply(1.0, None, mix=0.0)

    def settle(self) -> None:
        """Wait for the sum that is under way; it is applied when it is due, as if nobody had waited."""
        if self._state.pending is not None:
            with self._waiting():
                self._state.pending.settle(self._state.feedback)

    def _hand_over(self, fragment: int) -> None:
        state, inner, comm = self._state, self._inner, self._comm
        own, layout = inner.state, self._fragments[fragment]
        num_tokens = own.num_tokens - inner.exchanged_at[fragment]
        parts = differences(names_of(layout), state.parameters, own.parameters, num_tokens)
        mx.eval(parts)
        layout += make_layout({NUM_TOKENS: parts[NUM_TOKENS]})
        first = sum(map(len, self._fragments[:fragment]))
        buckets = ({(comm.rank, comm.rank + 1): bucket} for bucket in to_buckets(layout, parts))
        what = f"fragment {fragment} after step {state.step}"
        wait = comm.start_all_reduce(layout, comm.size, buckets, what, state.feedback.part(first))
        state.pending = Pending(lambda: from_buckets(layout, wait()))
        inner.exchanged_at[fragment] = own.num_tokens

    def _apply(self, learning_rate: float, momentum: float | None, mix: float) -> None:
        """Take the outer step that the sums under way ask for; the arguments are those of `take_outer_step`."""
        state = self._state
        assert state.pending is not None
        self.settle()
        sums, state.pending = state.pending.sums, None
        take_outer_step(state, sums, learning_rate, momentum, mix)

    def _add(self, heard: _Heard, packed: mx.array, peer: int) -> None:
        num = len(heard.tally.losses)
        due = packed.shape == (2 * num + 2,) and packed.dtype == mx.float32
        values = np.asarray(packed) if due else np.empty(0)
        if not due or not np.all((values[num : 2 * num] >= 0) & (values[num : 2 * num] < 1 << 24)):
            reason = f"sent {packed.dtype}{tuple(packed.shape)} where {num} losses and counts were due"
            raise self._refused(heard, peer, reason)
        heard.tally.losses += values[:num]
        heard.tally.num_tokens += values[num : 2 * num].astype(np.int64)
        heard.tally.stop |= bool(values[-2])
        heard.grad_norm = float(np.maximum(heard.grad_norm, values[-1]))

    def _refused(self, heard: _Heard, peer: int, reason: str) -> CommError:
        return CommError(f"recv of {_losses(heard.step)}", peer, self._comm.generation, 0.0, reason)

    def _moment(self) -> _Moment:
        traffic = self._comm.traffic
        return _Moment(time.monotonic(), self._waited_s, traffic.reduce_s, traffic.sent_bytes)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - start_s


def take_outer_step(state: TrainState, sums: Arrays, learning_rate: float, momentum: float | None, mix: float) -> None:
    """Take the outer step that sums ask for, and bring this rank's copy to where it leads.

    Args:
        state: with an `inner`.
        sums: of `outer.differences` of some parameters; without effect where they are not finite, or of no tokens.
        learning_rate: of the outer step.
        momentum: None neither uses nor changes it.
        mix: share of the copy that stays.
    """
    assert state.inner is not None
    if finite(sums) and sums[NUM_TOKENS].item():
        moved, kept = nesterov(state.parameters, state.optimizer, sums, learning_rate, momentum or 0.0)
        if momentum is None:
            kept = {}
        mx.eval(moved, kept)
        state.model.update(tree_unflatten(list(moved.items())))
        state.optimizer |= kept
    agreed, mine = state.parameters, state.inner.state.parameters
    names = [name for name in sums if name != NUM_TOKENS]
    brought = {name: mix * mine[name] + (1 - mix) * agreed[name] if mix else agreed[name] for name in names}
    mx.eval(brought)
    state.inner.state.model.update(tree_unflatten(list(brought.items())))


_ALONE = LocalComm()


def _packed(heard: _Heard) -> mx.array:
    """Float32: exact for as many tokens as a micro-batch has."""
    tally = heard.tally
    counts = [*tally.num_tokens.tolist(), float(tally.stop), heard.grad_norm]
    return mx.array([*tally.losses.tolist(), *counts], mx.float32)


def _losses(step: int) -> str:
    return f"the losses of step {step + 1}"
