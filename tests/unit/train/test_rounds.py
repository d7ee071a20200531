"""Rounds that are taken as one by a group that may lose members: the updates of the others are never lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from diloco_samples import NUM_STEPS, inner_of, loosely, make_state, timeless, train
from hypothesis import given
from hypothesis import strategies as st
from train_samples import make_plan, make_rows, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.data import share
from mlx_distributed.train import attempts, rounds
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.rounds import RoundAttempt
from mlx_distributed.train.state import TrainState, digest
from mlx_distributed.train.step_info import StepInfo


def make_phases(config: Config, stop_requested: Callable[[], bool] = lambda: False) -> Phases:
    rows = make_rows()
    return Phases(config, make_plan(rows, config, NUM_STEPS), rows, stop_requested)


def begin(phases: Phases, state: TrainState) -> RoundAttempt:
    attempt = attempts.begin(phases, state)
    assert isinstance(attempt, RoundAttempt)
    return attempt


def parts(phases: Phases, attempt: RoundAttempt, step: int, size: int) -> list[list[int]]:
    """The leaves that each rank takes where nothing happens: of every step a range of its micro-batches."""
    by_rank: list[list[int]] = [[] for _ in range(size)]
    leaves = {leaf: place for place, leaf in enumerate(attempt._round.leaves)}
    for leaf, place in leaves.items():
        assert leaf.step >= step
        ranges = share(len(phases.plan.microbatches(leaf.step)), [1.0] * size)
        (rank,) = [rank for rank, (start, stop) in enumerate(ranges) if start <= leaf.number < stop]
        by_rank[rank].append(place)
    return by_rank


def take_rounds(phases: Phases, state: TrainState, comm: Communicator, num: int | None = None) -> list[StepInfo]:
    infos = []
    while state.step < NUM_STEPS and len(infos) != num:
        attempt = begin(phases, state)
        attempt.reduce(parts(phases, attempt, state.step, comm.size)[comm.rank], comm)
        attempt.settle()
        infos.append(attempt.commit())
    return infos


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("every", "fragments"), [(4, 1), (4, 2), (5, 3), (11, 2), (20, 1)])
def test_rounds_that_nothing_happens_to_are_those_of_a_plain_run(size: int, every: int, fragments: int) -> None:
    config = loosely(*[1.0] * size, every=every, fragments=fragments)
    expected, phases = train(config)[0], make_phases(config)
    states = [make_state(config) for _ in range(size)]
    infos = on_ranks(size, lambda comm: take_rounds(phases, states[comm.rank], comm))
    for state, found in zip(states, infos, strict=True):
        assert state.digest() == expected.digest
        assert (state.step, state.num_tokens) == (NUM_STEPS, expected.num_tokens)
        assert [timeless(info) for info in found] == [timeless(info) for info in infos[0]]
    ends = [info.step for info in infos[0]]
    assert ends == list(rounds.stops(config.parallel.diloco, NUM_STEPS))
    for info in infos[0]:
        told = expected.infos[info.step - info.num_steps : info.step]
        assert info.num_tokens == sum(step.num_tokens for step in told)
        assert info.loss == pytest.approx(sum(step.loss * step.num_tokens for step in told) / info.num_tokens)
        assert info.grad_norm == pytest.approx(max(step.grad_norm for step in told))
        assert info.learning_rate == told[-1].learning_rate


class Dying(LocalComm):
    """A group that fails before the update of this number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def check(self, what: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise CommError(what, None, 0, 0.0, "died")


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_the_others_finish_a_round_without_the_lost_one(fails_at: int) -> None:
    config = loosely(1.0, 1.0, 1.0, every=4)
    phases = make_phases(config)
    states = [make_state(config) for _ in range(3)]
    on_ranks(3, lambda comm: take_rounds(phases, states[comm.rank], comm, num=1))
    agreed = states[0].digest()
    begun = [begin(phases, state) for state in states[:2]]
    mine = parts(phases, begun[0], states[0].step, 3)

    def body(comm: Communicator) -> tuple[StepInfo, dict[str, str]]:
        state, attempt = states[comm.rank], begun[comm.rank]
        with pytest.raises(CommError):
            attempt.reduce(mine[comm.rank], Dying(fails_at))
        assert state.digest() == agreed
        held = {leaf for lo, hi in attempt.held for leaf in range(lo, hi)}
        assert held <= set(mine[comm.rank])
        before = digest(inner_of(state).parameters)
        attempt.keep(attempt.held)
        assert digest(inner_of(state).parameters) == before
        leaves = [leaf for leaf in mine[comm.rank] if leaf not in held] + mine[2][comm.rank :: 2]
        attempt.reduce(leaves, comm)
        assert {leaf for lo, hi in attempt.held for leaf in range(lo, hi)} == held | set(leaves)
        return timeless(attempt.commit()), state.digest()

    first, second = on_ranks(2, body)
    assert first == second
    num_tokens = sum(
        int(phases.rows[row].loss_mask[1:].sum())
        for step in range(4, 8)
        for batch in phases.plan.microbatches(step)
        for row in batch
    )
    assert first[0].num_tokens == num_tokens
    assert sum(inner_of(state).num_tokens for state in states) == states[0].num_tokens


def test_who_holds_what_others_hold_begins_anew() -> None:
    config = loosely(1.0, 1.0, every=4)
    phases, state = make_phases(config), make_state(config)
    take_rounds(phases, state, LocalComm(), num=1)
    attempt = begin(phases, state)
    attempt.reduce(range(3), LocalComm())
    assert digest(inner_of(state).parameters) != digest(state.parameters)
    attempt.keep(())
    assert attempt.held == ()
    assert digest(inner_of(state).parameters) == digest(state.parameters)
    assert (inner_of(state).num_tokens, inner_of(state).optimizer["step"].item()) == (0, 0)
    other = make_state(config)
    take_rounds(phases, other, LocalComm(), num=1)
    rounds.begin_anew(phases, other)
    for each in (state, other):
        take_rounds(phases, each, LocalComm())
    assert state.digest() == other.digest()


@pytest.mark.parametrize("fragments", [1, 2])
def test_who_looks_on_has_what_the_others_have(fragments: int) -> None:
    config = loosely(1.0, 1.0, every=4, fragments=fragments)
    phases, observer = make_phases(config), make_state(config)
    states = [make_state(config) for _ in range(2)]
    told: list[dict[str, mx.array]] = []

    def body(comm: Communicator) -> None:
        state = states[comm.rank]
        while state.step < NUM_STEPS:
            attempt = begin(phases, state)
            attempt.reduce(parts(phases, attempt, state.step, 2)[comm.rank], comm)
            if comm.rank == 0:
                told.append({name: mx.array(np.asarray(array)) for name, array in attempt.sums.items()})
                mx.eval(told[-1])
            attempt.commit()

    on_ranks(2, body)
    for number, sums in enumerate(told):
        empty = attempts.empty_sums(phases, observer, number)
        assert {name: (a.dtype, a.shape) for name, a in empty.items()} == {
            n: (a.dtype, a.shape) for n, a in sums.items()
        }
        attempts.replay(phases, observer, sums)
        assert attempts.num_taken(phases, observer.step) == number + 1
        assert digest(inner_of(observer).parameters) == digest(observer.parameters)
    assert observer.digest() == states[0].digest()
    assert (observer.step, observer.num_tokens, observer.num_skipped) == (
        states[0].step,
        states[0].num_tokens,
        states[0].num_skipped,
    )


def test_a_round_that_is_entered_in_its_middle_is_shorter() -> None:
    config = loosely(1.0, every=4)
    phases, state = make_phases(config), make_state(config)
    state.step = 2
    info = take_rounds(phases, state, LocalComm(), num=1)[0]
    assert (info.step, info.num_steps) == (4, 2)
    assert attempts.empty_sums(phases, make_state(config), 0).keys() == attempts.empty_sums(phases, state, 1).keys()


def test_a_stop_is_heard_by_all_at_the_end_of_a_round() -> None:
    config = loosely(1.0, 1.0, every=4)
    states = [make_state(config) for _ in range(2)]

    def body(comm: Communicator) -> bool:
        phases = make_phases(config, lambda: comm.rank == 1)
        return take_rounds(phases, states[comm.rank], comm, num=1)[0].stop_requested

    assert on_ranks(2, body) == [True, True]


def test_updates_that_are_not_finite_are_told_of() -> None:
    config = loosely(1.0, every=4)
    phases, state = make_phases(config), make_state(config)
    weight = inner_of(state).model.embed.weight
    inner_of(state).model.embed.weight = mx.full(weight.shape, float("nan"))
    info = take_rounds(phases, state, LocalComm(), num=1)[0]
    assert info.skipped is not None
    assert info.skipped.startswith("step 4: the loss of micro-batch ")
    assert (state.num_skipped, state.num_tokens) == (4, 0)


@given(st.integers(1, 40), st.integers(1, 200), st.data())
def test_every_step_is_in_one_round(sync_every: int, num_steps: int, data: st.DataObject) -> None:
    diloco = DilocoConfig(sync_every=sync_every, fragments=data.draw(st.integers(1, sync_every)))
    config = loosely(1.0)
    phases = make_phases(replace(config, parallel=replace(config.parallel, diloco=diloco)))
    stops = rounds.stops(diloco, NUM_STEPS)
    assert list(stops) == sorted(set(stops))
    assert stops[-1] == NUM_STEPS
    lengths = [rounds.num_steps(phases, stop) for stop in stops]
    assert sum(lengths) == NUM_STEPS
    assert [rounds.num_taken(phases, step) for step in range(NUM_STEPS + 1)] == [
        sum(stop <= step for stop in stops) for step in range(NUM_STEPS + 1)
    ]
    assert rounds.stops(diloco, num_steps)[-1] == num_steps
