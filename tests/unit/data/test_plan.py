from __future__ import annotations

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.data.plan import Plan, balanced_order, random_keys
from mlx_distributed.parallel.data import share


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
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 2000).astype(int) + 1
    plan = one_source(lengths.tolist(), 32, 8)
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
