from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.data.packing import best_fit, cut_by_length, deal

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def tokens(lengths: list[int], bins: list[list[int]]) -> list[int]:
    return [sum(lengths[row] for row in rows) for rows in bins]


@given(LENGTHS, st.integers(1, 12))
def test_all_rows_are_dealt_evenly(lengths: list[int], num_bins: int) -> None:
    bins = deal(lengths, num_bins)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert len(bins) == num_bins
    sizes = tokens(lengths, bins)
    assert max(sizes) - min(sizes) <= max(lengths)
    assert all(bins) or len(lengths) < num_bins


@given(LENGTHS, st.integers(1, 150))
def test_best_fit_keeps_the_limit_in_few_bins(lengths: list[int], limit: int) -> None:
    bins = best_fit(lengths, limit)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or sum(lengths[row] for row in rows) <= limit for rows in bins)
    if max(lengths) <= limit:
        # Two bins that are half full or less would be one.
        assert sum(size * 2 <= limit for size in tokens(lengths, bins)) <= 1
        assert len(bins) >= math.ceil(sum(lengths) / limit)


def test_best_fit_takes_the_fullest_bin_with_room() -> None:
    assert best_fit([2, 5, 6, 3], 8) == [[2, 0], [1, 3]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9).map(sorted), st.integers(0, 30), st.none() | st.integers(1, 90)
)
def test_no_other_cut_costs_less(lengths: list[int], overhead: int, limit: int | None) -> None:
    @cache
    def least(stop: int) -> float:
        if not stop:
            return 0.0
        areas = {start: (stop - start) * lengths[stop - 1] for start in range(stop)}
        fits = [start for start, area in areas.items() if limit is None or area <= limit or start == stop - 1]
        return min(least(start) + areas[start] + overhead for start in fits)

    runs = cut_by_length(lengths, overhead, limit)
    assert [row for start, stop in runs for row in range(start, stop)] == list(range(len(lengths)))
    areas = [(stop - start) * lengths[stop - 1] for start, stop in runs]
    assert sum(areas) + overhead * len(runs) == least(len(lengths))
    if limit is not None:
        assert all(area <= limit or stop - start == 1 for area, (start, stop) in zip(areas, runs, strict=True))


@pytest.mark.parametrize(("overhead", "runs"), [(0, [(0, 2), (2, 3)]), (15, [(0, 2), (2, 3)]), (16, [(0, 3)])])
def test_a_run_less_may_be_worth_its_padding(overhead: int, runs: list[tuple[int, int]]) -> None:
    assert cut_by_length([2, 2, 10], overhead) == runs
