"""Which rows the micro-batches of step t hold: a pure function of (rows' lengths, configuration, seed, t).

Nobody owns data state: the position in the data is the number of the step, and any worker can name any micro-batch.
Orders come from sorting 64-bit keys that count up, so they depend on no library's shuffle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from mlx_distributed.config.schema import LENGTH_MULTIPLE
from mlx_distributed.data.packing import best_fit, cut_by_length, deal

WINDOW_STEPS = 64
"""Rows are sorted by length within so many global batches. Larger windows save little padding and mix less."""
MICROBATCH_OVERHEAD = 64
"""Tokens of padding that are put up with to have a micro-batch less."""

_EPOCH, _PASS, _MICROBATCH = range(3)  # what a sequence of keys is for
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def random_keys(count: int, *stream: int) -> np.ndarray:
    """`count` pseudo-random keys, uint64 [count], the same on every machine; key i depends on (stream, i) only.

    SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), seeded by folding the
    stream.
    """
    state = np.zeros(1, np.uint64)
    for number in stream:
        state = _mix(state + np.uint64(_GOLDEN)) ^ np.uint64(number & _MASK)
    return _mix(_mix(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class Plan:
    """The micro-batches of every step.

    An epoch draws every row of a source with weight 1 once, and of a source with weight w and n rows the next
    round(w * n) (at least one) of an endless sequence of shuffled passes, so that weight 0.5 shows the other half in
    the next epoch. Rows of similar length are put into groups, and the groups are shuffled over a window of steps, so
    that a step mixes lengths. The last step of an epoch may be smaller than the others, and nothing is dropped.

    A group is a micro-batch, unless rows are packed or micro-batches are limited by their tokens: then the rows of a
    step are divided anew. Which rows a step trains does not depend on `packing`.
    """

    lengths: Sequence[int]
    """Of every row, in tokens."""
    spans: Sequence[tuple[int, int, float]]
    """Per source: its first row, the row after its last, and its weight."""
    global_batch_size: int
    micro_batch_size: int
    """Divides `global_batch_size`."""
    seed: int = 0
    epochs: float = 1.0
    max_steps: int | None = None
    """Wins over `epochs`."""
    micro_batch_tokens: int | None = None
    """In place of `micro_batch_size`."""
    packing: bool = False

    @property
    def num_microbatches(self) -> int:
        """Of a full step; where micro-batches are limited by their tokens, the most in one of the first steps."""
        if self.micro_batch_tokens is not None:
            return max(len(self.microbatches(step)) for step in range(min(self.steps_per_epoch, WINDOW_STEPS)))
        return self.global_batch_size // self.micro_batch_size

    @cached_property
    def group_size(self) -> int:
        """Rows of similar length that go into a step together: as many as a micro-batch holds, about."""
        if self.micro_batch_tokens is None:
            return self.micro_batch_size
        fitting = self.micro_batch_tokens * len(self.lengths) // max(sum(self.lengths), 1)
        sizes = range(1, min(fitting, self.global_batch_size) + 1)
        return max((size for size in sizes if not self.global_batch_size % size), default=1)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(_num_draws(span) for span in self.spans) / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        if self.max_steps is not None:
            return self.max_steps
        # Forgives rounding: 1.1 epochs of 10 steps are 11 steps, though 1.1 * 10 > 11 in floating point.
        return max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9))

    def microbatches(self, step: int) -> list[tuple[int, ...]]:
        """Row numbers of each micro-batch of step `step` (from 0). Their number may differ from step to step."""
        microbatches = self._divide(self.groups(step))
        costs = [self._size(rows) for rows in microbatches]
        return [microbatches[i] for i in balanced_order(costs)]

    def groups(self, step: int) -> list[tuple[int, ...]]:
        """Row numbers of each group of a step."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        num_groups = self.global_batch_size // self.group_size
        return _epoch(self, epoch)[step_of_epoch * num_groups : (step_of_epoch + 1) * num_groups]

    def _divide(self, groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The micro-batches of a step of these groups."""
        if self.micro_batch_tokens is None and not self.packing:
            return groups
        rows = sorted((row for group in groups for row in group), key=lambda row: self.lengths[row])
        lengths = [self.lengths[row] for row in rows]
        if self.micro_batch_tokens is None:
            bins = deal(lengths, len(groups))
        elif self.packing:
            limit = self.micro_batch_tokens // LENGTH_MULTIPLE * LENGTH_MULTIPLE
            tight = best_fit(lengths, limit)
            even = deal(lengths, len(tight))  # All wait for the slowest, so this is better where it fits as well.
            fits = max(sum(lengths[i] for i in numbers) for numbers in even) <= limit
            bins = even if fits else tight
        else:
            padded = [_round_up(length) for length in lengths]
            runs = cut_by_length(padded, MICROBATCH_OVERHEAD, self.micro_batch_tokens)
            bins = [list(range(start, stop)) for start, stop in runs]
        return [tuple(rows[i] for i in numbers) for numbers in bins]

    def _size(self, rows: tuple[int, ...]) -> int:
        """Of a micro-batch, in tokens."""
        lengths = [self.lengths[row] for row in rows]
        return sum(lengths) if self.packing else len(lengths) * max(lengths)


def balanced_order(costs: Sequence[float]) -> list[int]:
    """Items in an order in which contiguous ranges cost about as much as they have items.

    A rank takes a contiguous range of a step's micro-batches, and all wait for the slowest. The items are split in two
    where the canonical sum splits (at the largest power of two below their number), so that both parts have nearly the
    same mean, and each part in the same way: from the dearest on, each item goes to the side with the most left to
    spend per free place.
    """

    def arrange(items: list[int]) -> list[int]:
        if len(items) < 2:
            return items
        left = 1 << ((len(items) - 1).bit_length() - 1)
        mean = sum(costs[item] for item in items) / len(items)
        sides: tuple[list[int], list[int]] = ([], [])
        free = [left, len(items) - left]
        budget = [mean * places for places in free]
        for item in items:
            side = max((i for i in (0, 1) if free[i]), key=lambda i: budget[i] / free[i])
            sides[side].append(item)
            free[side] -= 1
            budget[side] -= costs[item]
        return arrange(sides[0]) + arrange(sides[1])

    return arrange(sorted(range(len(costs)), key=lambda item: -costs[item]))


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _num_draws(span: tuple[int, int, float]) -> int:
    start, stop, weight = span
    return max(1, round(weight * (stop - start))) if stop > start else 0


def _draws(plan: Plan, source: int, epoch: int) -> np.ndarray:
    """Row numbers that `source` gives to `epoch`."""
    start, stop, _ = plan.spans[source]
    num_rows, num_draws = stop - start, _num_draws(plan.spans[source])
    if not num_draws:
        return np.zeros(0, np.int64)
    first, skip = divmod(epoch * num_draws, num_rows)
    last = ((epoch + 1) * num_draws - 1) // num_rows
    passes = [
        np.argsort(random_keys(num_rows, plan.seed, _PASS, source, n), kind="stable") for n in range(first, last + 1)
    ]
    return start + np.concatenate(passes)[skip : skip + num_draws]


@lru_cache(maxsize=2)
def _epoch(plan: Plan, epoch: int) -> list[tuple[int, ...]]:
    """All groups of an epoch in the order of use."""
    rows = np.concatenate([_draws(plan, source, epoch) for source in range(len(plan.spans))])
    rows = rows[np.argsort(random_keys(len(rows), plan.seed, _EPOCH, epoch), kind="stable")]
    lengths = np.asarray(plan.lengths)[rows]
    window = WINDOW_STEPS * plan.global_batch_size
    # The last window takes the rest, since a small window of its own would mix lengths badly.
    edges = [*range(0, max(len(rows) // window, 1) * window, window), len(rows)]
    groups: list[tuple[int, ...]] = []
    for start, stop in pairwise(edges):
        by_length = rows[start:stop][np.argsort(lengths[start:stop], kind="stable")]
        short = len(by_length) % plan.group_size
        full = by_length[short:].reshape(-1, plan.group_size)
        order = np.argsort(random_keys(len(full), plan.seed, _MICROBATCH, epoch, start), kind="stable")
        groups += [tuple(row) for row in full[order].tolist()]
        if short:  # only in the last window, since the others are whole global batches
            groups.append(tuple(by_length[:short].tolist()))
    return groups
