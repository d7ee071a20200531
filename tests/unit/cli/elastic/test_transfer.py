"""A state that was taken over, and brought up to date, is that of the others, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from train_samples import CONFIG, make_plan, make_rows, make_state

from mlx_distributed.cli.elastic.transfer import snapshot_of, sums_layout, take, views
from mlx_distributed.comm.base import LocalComm
from mlx_distributed.elastic.protocol import NOTHING, START, Outcome
from mlx_distributed.elastic.recovery import Received, layout_of
from mlx_distributed.elastic.snapshots import Snapshot
from mlx_distributed.train.attempt import Attempt
from mlx_distributed.train.loss_scale import LossScale
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState


def make_phases() -> Phases:
    rows = make_rows()
    return Phases(CONFIG, make_plan(rows), rows)


def take_step(phases: Phases, state: TrainState) -> tuple[Outcome, dict[str, np.ndarray]]:
    attempt = Attempt(phases, state)
    digest = attempt.reduce(range(attempt.num_leaves), LocalComm())
    sums = views(attempt.sums)
    attempt.commit()
    return Outcome(state.step, digest), sums


def test_a_newcomer_has_the_state_and_the_steps_since() -> None:
    phases, state, other = make_phases(), make_state(), make_state(seed=1)
    outcome, _ = take_step(phases, state)
    snapshot = snapshot_of(state, outcome)
    later = [take_step(phases, state) for _ in range(3)]
    assert layout_of(later[0][1]) == sums_layout(phases, other, 2)
    assert take(phases, other, NOTHING, Received(snapshot, tuple(later))) == later[-1][0]
    assert other.digest() == state.digest()
    assert (other.step, other.num_tokens, other.num_skipped) == (state.step, state.num_tokens, state.num_skipped)


def test_the_loss_scale_goes_with_the_state_and_halves_where_a_step_is_left_out() -> None:
    phases, state, other = make_phases(), make_state(), make_state(seed=1)
    state.loss_scale, other.loss_scale = LossScale(2.0**127), LossScale()
    outcome, _ = take_step(phases, state)
    assert state.loss_scale == LossScale(2.0**126)
    snapshot = snapshot_of(state, outcome)
    later = [take_step(phases, state) for _ in range(2)]
    assert state.loss_scale.value < 2.0**126
    assert take(phases, other, NOTHING, Received(snapshot, tuple(later))) == later[-1][0]
    assert (other.digest(), other.loss_scale) == (state.digest(), state.loss_scale)
    assert (other.step, other.num_tokens, other.num_skipped) == (state.step, state.num_tokens, 0)


def test_who_has_missed_some_steps_only_takes_those() -> None:
    phases, state, other = make_phases(), make_state(), make_state()
    later = [take_step(phases, state) for _ in range(2)]
    assert take(phases, other, START, Received(None, tuple(later))) == later[-1][0]
    assert other.digest() == state.digest()


def test_sums_that_are_not_those_of_the_others_are_not_applied() -> None:
    phases, state, other = make_phases(), make_state(), make_state()
    (first, sums), (second, wrong) = (take_step(phases, state) for _ in range(2))
    wrong = dict(wrong, **{"head.weight": np.asarray(mx.zeros((16, 8)))})
    assert take(phases, other, START, Received(None, ((first, sums), (second, wrong)))) == first
    assert other.step == 1


def test_a_snapshot_stays_as_it_was() -> None:
    phases, state = make_phases(), make_state()
    outcome, _ = take_step(phases, state)
    snapshot = snapshot_of(state, outcome)
    copies = {name: array.copy() for name, array in snapshot.arrays.items()}
    take_step(phases, state)
    assert isinstance(snapshot, Snapshot)
    for name, array in snapshot.arrays.items():
        assert np.array_equal(array, copies[name]), name
