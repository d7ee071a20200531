from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.config.schema import LENGTH_MULTIPLE
from mlx_distributed.data.batch import collate, pack
from mlx_distributed.data.plan import Plan, balanced_order, random_keys
from mlx_distributed.data.tokenize import Row
from mlx_distributed.parallel.data import share

ALPACA = (np.random.default_rng(0).lognormal(5, 0.8, 2000).astype(int) + 1).tolist()
"""Lengths like those of real rows."""


def rows_of(plan: Plan, steps: range) -> list[int]:
    return [row for step in steps for microbatch in plan.microbatches(step) for row in microbatch]


def one_source(
    lengths: list[int], global_batch_size: int, micro_batch_size: int, seed: int = 0, epochs: float = 1.0
) -> Plan:
    return Plan(lengths, ((0, len(lengths), 1.0),), global_batch_size, micro_batch_size, seed, epochs)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=300), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**63)
)
def test_every_row_once_an_epoch_in_batches_of_the_right_size(lengths: list[int], m: int, num: int, seed: int) -> None:
    plan = one_source(lengths, m * num, m, seed)
    assert plan.num_microbatches == num
    assert plan.num_steps == plan.steps_per_epoch == math.ceil(len(lengths) / (m * num))
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(rows_of(plan, steps)) == list(range(len(lengths)))
        sizes = [[len(microbatch) for microbatch in plan.microbatches(step)] for step in steps]
        assert all(step == [m] * num for step in sizes[:-1])
        *full, last = sorted(sizes[-1], reverse=True)  # A step is ordered by what its micro-batches cost.
        assert len(sizes[-1]) <= num
        assert all(size == m for size in full)
        assert 0 < last <= m


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(0, 9), st.randoms())
def test_a_step_is_the_same_in_any_order_of_asking(lengths: list[int], seed: int, random: Random) -> None:
    plan = one_source(lengths, 8, 4, seed, epochs=3)
    steps = list(range(plan.num_steps))
    expected = [plan.microbatches(step) for step in steps]
    random.shuffle(steps)
    again = one_source(lengths, 8, 4, seed, epochs=3)
    assert {step: again.microbatches(step) for step in steps} == dict(enumerate(expected))


def test_epochs_and_seeds_differ() -> None:
    lengths = [5] * 64
    plan = one_source(lengths, 8, 4)
    first, second = rows_of(plan, range(8)), rows_of(plan, range(8, 16))
    assert len({tuple(first), tuple(second), tuple(rows_of(one_source(lengths, 8, 4, seed=1), range(8)))}) == 3


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1.0, None, 10), (0.25, None, 3), (1.1, None, 11), (9.0, 4, 4), (1e-9, None, 1)],
)
def test_number_of_steps(epochs: float, max_steps: int | None, expected: int) -> None:
    assert Plan([1] * 40, ((0, 40, 1.0),), 4, 2, 0, epochs, max_steps).num_steps == expected


def test_half_a_weight_shows_the_other_half_in_the_next_epoch() -> None:
    plan = Plan([1] * 20, ((0, 10, 0.5), (10, 10, 1.0), (10, 20, 2.0)), 5, 5, seed=3)
    assert plan.steps_per_epoch == 5
    first, second = Counter(rows_of(plan, range(5))), Counter(rows_of(plan, range(5, 10)))
    assert all(counts[row] == 2 for counts in (first, second) for row in range(10, 20))
    halves = [{row for row in counts if row < 10} for counts in (first, second)]
    assert [len(half) for half in halves] == [5, 5]
    assert halves[0] | halves[1] == set(range(10))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.1, 3.0))
def test_weights_are_kept_over_epochs(num_rows: int, weight: float) -> None:
    plan = Plan([1] * num_rows, ((0, num_rows, weight),), 4, 4)
    counts = Counter(rows_of(plan, range(12 * plan.steps_per_epoch)))
    assert sum(counts.values()) == 12 * max(1, round(weight * num_rows))
    assert max(counts[row] for row in range(num_rows)) - min(counts[row] for row in range(num_rows)) <= 1


def test_a_tiny_weight_still_shows_a_row() -> None:
    assert Plan([1] * 3, ((0, 3, 0.01),), 4, 4).steps_per_epoch == 1


def test_little_padding_and_mixed_steps() -> None:
    lengths = np.asarray(ALPACA)
    plan = one_source(ALPACA, 32, 8)
    tokens = padded = 0
    means = []
    for step in range(plan.num_steps):
        microbatches = [lengths[list(microbatch)] for microbatch in plan.microbatches(step)]
        tokens += sum(int(rows.sum()) for rows in microbatches)
        padded += sum(int(rows.max()) * len(rows) for rows in microbatches)
        means.append(np.concatenate(microbatches).mean())
    assert 1 - tokens / padded < 0.06
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5
    assert np.std(means) < 0.75 * lengths.std()


def ways(lengths: list[int], global_batch_size: int, micro_batch_size: int, budget: int) -> list[list[Plan]]:
    """Plans that train the same rows in each step, in two lists."""
    plan = one_source(lengths, global_batch_size, micro_batch_size)
    return [
        [replace(plan, packing=packing, micro_batch_tokens=limit) for packing in (False, True)]
        for limit in (None, budget)
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=120), st.integers(1, 4), st.integers(1, 5), st.integers(90, 400)
)
def test_packing_does_not_change_what_a_step_trains(lengths: list[int], m: int, num: int, budget: int) -> None:
    for plans in ways(lengths, m * num, m, budget):
        for step in range(2 * plans[0].steps_per_epoch):
            side_by_side, packed = (sorted(rows_of(plan, range(step, step + 1))) for plan in plans)
            assert side_by_side == packed
            assert all(rows for plan in plans for rows in plan.microbatches(step))
        for plan in plans:
            rows = rows_of(plan, range(plan.steps_per_epoch))
            assert sorted(rows) == list(range(len(lengths)))


def shape(plan: Plan, rows: tuple[int, ...]) -> tuple[int, int]:
    made = [Row(np.zeros(plan.lengths[row], np.int32), np.zeros(plan.lengths[row], np.bool_)) for row in rows]
    multiple = 1 if plan.micro_batch_tokens is None and not plan.packing else LENGTH_MULTIPLE
    return (pack if plan.packing else collate)(made, multiple).tokens.shape


@pytest.mark.parametrize(
    ("global_batch_size", "micro_batch_size", "budget"), [(32, 8, 1416), (16, 4, 4096), (8, 8, 1500)]
)
def test_padding_budgets_and_few_shapes(global_batch_size: int, micro_batch_size: int, budget: int) -> None:
    lengths = [min(length, 1410) for length in ALPACA]
    for plan in itertools.chain(*ways(lengths, global_batch_size, micro_batch_size, budget)):
        steps = [[shape(plan, rows) for rows in plan.microbatches(step)] for step in range(plan.num_steps)]
        sizes = [num_rows * length for step in steps for num_rows, length in step]
        assert 1 - sum(lengths) / sum(sizes) <= (0.02 if plan.packing else 0.06)
        if plan.micro_batch_tokens is not None:
            assert max(sizes) <= budget
        if plan.packing or plan.micro_batch_tokens is not None:
            assert all(length % LENGTH_MULTIPLE == 0 for step in steps for _, length in step)
        if plan.packing:
            fewest = [math.ceil(sum(length for _, length in step) / budget) for step in steps]
            spreads = [max(length for _, length in step) - min(length for _, length in step) for step in steps]
            if plan.micro_batch_tokens is None:
                assert np.mean(spreads) <= np.mean(lengths)
            else:
                assert sum(map(len, steps)) <= 1.1 * sum(fewest) + 1


def test_a_large_budget_takes_a_step_at_once() -> None:
    plan = replace(one_source(ALPACA, 8, 8), micro_batch_tokens=1 << 20, packing=True)
    assert {len(plan.microbatches(step)) for step in range(plan.num_steps)} == {1}
    assert (plan.num_microbatches, plan.group_size) == (1, 8)


@given(st.lists(st.integers(1, 1000), max_size=70))
def test_a_balanced_order_is_an_order(costs: list[int]) -> None:
    assert sorted(balanced_order(costs)) == list(range(len(costs)))


@pytest.mark.parametrize(("num", "size", "within"), [(4, 2, 1.12), (8, 2, 1.05), (8, 3, 1.09), (16, 4, 1.05)])
def test_ranges_of_a_balanced_order_cost_alike(num: int, size: int, within: float) -> None:
    rng = np.random.default_rng(0)
    places = max(stop - start for start, stop in share(num, [1.0] * size))
    excess = []
    for _ in range(200):
        costs = rng.integers(10, 100, num)
        ordered = costs[balanced_order(costs.tolist())]
        dearest = max(ordered[start:stop].sum() for start, stop in share(num, [1.0] * size))
        excess.append(dearest / (costs.mean() * places))
    assert np.mean(excess) < within


def test_keys_are_those_of_splitmix64() -> None:
    def reference(state: int, count: int) -> list[int]:
        keys, mask = [], (1 << 64) - 1
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            keys.append(z ^ (z >> 31))
        return keys

    # With no stream the state is mix(0), and mix(0) is 0.
    assert random_keys(5).tolist() == reference(0, 5)
    assert random_keys(3, 1).tolist() == random_keys(5, 1)[:3].tolist()
    assert len({tuple(random_keys(3, *stream)) for stream in ((1, 2), (2, 1), (1,), (0, 1, 2), (-1, 2))}) == 5
