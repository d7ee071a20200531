"""How rows are put together so that little is padded: pure functions of their lengths.

Ties are decided by the place of a row, so the answer is the same on every machine.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def deal(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Rows dealt to bins of about as many tokens each: the longest first, each to the bin with the fewest tokens.

    Returns:
        Numbers of the rows of every bin; none is empty where there are as many rows as bins.

    Source:
        the longest-processing-time rule of Graham 1969, "Bounds on multiprocessing timing anomalies".
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for row in _longest_first(lengths):
        tokens, number = heap[0]
        bins[number].append(row)
        heapq.heapreplace(heap, (tokens + lengths[row], number))
    return bins


def best_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows in bins of at most `limit` tokens, by best fit decreasing: the longest first, each to the fullest bin that
    has room for it. There are at most 11/9 as many bins as are needed, and one (Johnson 1973). A row that is longer
    than the limit has a bin to itself."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # Sorted: tokens that fit into a bin, and its number.
    for row in _longest_first(lengths):
        place = bisect_left(room, (lengths[row], 0))
        left, number = room.pop(place) if place < len(room) else (limit, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(row)
        insort(room, (left - lengths[row], number))
    return bins


def cut_by_length(lengths: Sequence[int], overhead: int, limit: int | None = None) -> list[tuple[int, int]]:
    """Rows that stand by length, cut into runs that are each padded to their longest, at the least cost.

    Args:
        lengths: ascending.
        overhead: what a further run costs, in tokens.
        limit: of the tokens of a run, padding too; a row that is longer is a run by itself.

    Returns:
        First row of every run and the row after its last.
    """
    costs, starts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, np.int64)
    for stop, longest in enumerate(lengths, 1):
        areas = np.arange(stop, 0, -1) * longest  # By first row of the run.
        totals = costs[:stop] + areas + overhead
        if limit is not None:
            totals[:-1][areas[:-1] > limit] = np.inf
        starts[stop] = totals.argmin()
        costs[stop] = totals[starts[stop]]
    runs, stop = [], len(lengths)
    while stop:
        runs.append((int(starts[stop]), stop))
        stop = int(starts[stop])
    return runs[::-1]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])
