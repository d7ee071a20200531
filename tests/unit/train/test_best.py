from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_samples import on_ranks

from mlx_distributed.comm.base import LocalComm
from mlx_distributed.train.best import cost, from_lines, share_evaluations, stops_early, to_lines

VALUES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf, math.nan]), max_size=12)
METRICS = st.sampled_from(["eval/loss", "eval/perplexity", "eval/bleu"])


def slowly(metric: str, values: list[float], patience: int, min_delta: float) -> int | None:
    """After which evaluation a run ends that keeps a best value and counts: the usual way to say it."""
    best, waited = math.inf, 0
    for number, value in enumerate(values, 1):
        lower = math.inf if math.isnan(value) else value if metric != "eval/bleu" else -value
        if lower < best - min_delta or number == 1:
            best, waited = lower, 0
        else:
            waited += 1
        if waited >= patience:
            return number
    return None


def first_stop(metric: str, values: list[float], patience: int, min_delta: float) -> int | None:
    evaluations = {10 * number: value for number, value in enumerate(values, 1)}
    for number in range(1, len(values) + 1):
        known = {step: value for step, value in evaluations.items() if step <= 10 * number}
        if stops_early(metric, known, patience, min_delta):
            return number
    return None


@given(METRICS, VALUES, st.integers(1, 4))
def test_it_stops_where_counting_would(metric: str, values: list[float], patience: int) -> None:
    assert first_stop(metric, values, patience, 0.0) == slowly(metric, values, patience, 0.0)


@given(METRICS, VALUES, st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0]))
def test_more_patience_and_smaller_demands_never_stop_earlier(
    metric: str, values: list[float], patience: int, min_delta: float
) -> None:
    stop = first_stop(metric, values, patience, min_delta) or math.inf
    assert stop <= (first_stop(metric, values, patience + 1, min_delta) or math.inf)
    assert stop <= (first_stop(metric, values, patience, 0.0) or math.inf)
    assert stop > patience


def test_small_gains_add_up_while_it_waits() -> None:
    falling = {step: 10.0 - 0.3 * step for step in range(10)}
    assert not stops_early("eval/loss", falling, 2, 0.5)
    assert stops_early("eval/loss", falling, 1, 0.5)
    assert not stops_early("eval/loss", dict.fromkeys(range(100), 1.0), None, 0.0)


def test_steps_count_and_not_the_order_in_which_they_were_heard_of() -> None:
    assert stops_early("eval/loss", {30: 2.0, 10: 1.0, 20: 3.0}, 2, 0.0)
    assert not stops_early("eval/loss", {30: 1.0, 10: 2.0, 20: 3.0}, 2, 0.0)


@pytest.mark.parametrize(("metric", "better", "worse"), [("eval/loss", 1.0, 2.0), ("eval/rougeL", 2.0, 1.0)])
def test_what_is_better_costs_less(metric: str, better: float, worse: float) -> None:
    assert cost(metric, better) < cost(metric, worse) < cost(metric, None) == cost(metric, math.nan) == math.inf


@given(METRICS, VALUES)
def test_lines_of_a_checkpoint_say_all_that_decides(metric: str, values: list[float]) -> None:
    evaluations = dict(enumerate(values))
    lines = to_lines(metric, evaluations)
    back = from_lines(metric, lines)
    assert {step: cost(metric, value) for step, value in back.items()} == {
        step: cost(metric, value) if math.isfinite(value) else math.inf for step, value in evaluations.items()
    }
    assert from_lines("eval/chrf", lines) == {}


@pytest.mark.parametrize("size", [1, 3])
def test_who_came_late_hears_of_all(size: int) -> None:
    known = [{10: 1.0, 20: math.inf, 30: 3.0, 40: 4.0}, {}, {20: math.inf, 10: 1.0}]
    found = on_ranks(size, lambda comm: share_evaluations(known[comm.rank], 30, comm))
    assert found == [{10: 1.0, 20: math.inf, 30: 3.0}] * size
    assert share_evaluations({}, 5, LocalComm()) == {}
