from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_distributed.parallel.data import rank_weights, share

WEIGHTS = st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=9)


@given(st.integers(0, 500), WEIGHTS)
def test_ranges_are_contiguous_cover_everything_and_are_in_proportion(
    num_microbatches: int, weights: list[float]
) -> None:
    assume(sum(weights) > 0)
    ranges = share(num_microbatches, weights)
    assert len(ranges) == len(weights)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_microbatches
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    for (start, stop), weight in zip(ranges, weights, strict=True):
        assert abs((stop - start) - num_microbatches * weight / sum(weights)) <= 1.0 + 1e-9
        if weight == 0.0:
            assert start == stop


@given(st.integers(0, 500), st.integers(1, 50))
def test_even_shares_differ_by_one_at_most(num_microbatches: int, size: int) -> None:
    sizes = [stop - start for start, stop in share(num_microbatches, rank_weights("even", size))]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 500), WEIGHTS, st.integers(-8, 8))
def test_only_the_proportions_of_the_weights_matter(num_microbatches: int, weights: list[float], exponent: int) -> None:
    assume(sum(weights) > 0)
    scaled = [weight * 2.0**exponent for weight in weights]  # a power of two: exact
    assert share(num_microbatches, scaled) == share(num_microbatches, weights)


@pytest.mark.parametrize(
    ("num_microbatches", "weights", "expected"),
    [
        (6, [1.0], [(0, 6)]),
        (6, [1.0, 4.0, 1.0], [(0, 1), (1, 5), (5, 6)]),
        (2, [1.0, 1.0, 1.0], [(0, 1), (1, 1), (1, 2)]),
        (3, [0.0, 1.0], [(0, 0), (0, 3)]),
    ],
)
def test_examples(num_microbatches: int, weights: list[float], expected: list[tuple[int, int]]) -> None:
    assert share(num_microbatches, weights) == expected


def test_the_setting_becomes_one_weight_per_rank() -> None:
    assert list(rank_weights("even", 3)) == [1.0, 1.0, 1.0]
    assert list(rank_weights((1.0, 2.5), 2)) == [1.0, 2.5]
