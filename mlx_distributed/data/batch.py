"""Rows -> the arrays of a micro-batch: padded side by side, or packed one after the other.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_distributed.config.schema import LENGTH_MULTIPLE, Config
from mlx_distributed.data.packing import cut_by_length
from mlx_distributed.data.tokenize import Row

GROUP_OVERHEAD = 64
"""Tokens of padding within attention that are put up with to have a group less."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch."""

    tokens: np.ndarray
    """int32 [B, L]."""
    loss_mask: np.ndarray
    """bool [B, L], True where the token is a target."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Where rows are packed, the lengths of those that follow each other in the only sequence, as the model is given
    them: they add up to L - 1, since the last token is a target alone. Rows of similar length are a group, whose
    attention is computed at once. None where every row stands by itself."""

    @property
    def num_rows(self) -> int:
        return len(self.tokens) if self.groups is None else sum(map(len, self.groups))

    @property
    def num_labels(self) -> int:
        """Tokens that are targets."""
        return int(self.loss_mask[:, 1:].sum())


def make_batch(rows: Sequence[Row], config: Config) -> Batch:
    """A micro-batch of these rows as `data.packing` and `train.micro_batch_tokens` want it."""
    if config.data.packing:
        return pack(rows, LENGTH_MULTIPLE)
    return collate(rows, 1 if config.train.micro_batch_tokens is None else LENGTH_MULTIPLE)


def by_length(rows: Sequence[Row], micro_batch_size: int, micro_batch_tokens: int | None = None) -> list[list[Row]]:
    """Rows in micro-batches, the shortest first: of `micro_batch_size` rows, or of as many as `micro_batch_tokens` has
    room for, padding too, and one at least."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        size = micro_batch_size if micro_batch_tokens is None else micro_batch_tokens // len(row.tokens)
        if not batches or len(batches[-1]) >= size:
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(rows: Sequence[Row], multiple: int = 1) -> Batch:
    """Rows side by side, padded on the right with token 0, which is no target, to the longest of them.

    Args:
        rows: one at least.
        multiple: of which L becomes one, so that there are few sizes.
    """
    length = _round_up(max(len(row.tokens) for row in rows), multiple)
    tokens = np.zeros((len(rows), length), np.int32)
    loss_mask = np.zeros((len(rows), length), np.bool_)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        loss_mask[number, : len(row.tokens)] = row.loss_mask
    return Batch(tokens, loss_mask)


def pack(rows: Sequence[Row], multiple: int = 1) -> Batch:
    """Rows one after the other, from the shortest to the longest, which alone is padded; see `collate`."""
    rows = sorted(rows, key=lambda row: len(row.tokens))
    lengths = [len(row.tokens) for row in rows]
    runs = cut_by_length(lengths, GROUP_OVERHEAD)
    padding = _round_up(sum(lengths), multiple) - sum(lengths)
    tokens = np.concatenate([*(row.tokens for row in rows), np.zeros(padding, np.int32)])
    loss_mask = np.concatenate([*(row.loss_mask for row in rows), np.zeros(padding, np.bool_)])
    lengths[-1] += padding - 1
    return Batch(tokens[None], loss_mask[None], tuple(tuple(lengths[start:stop]) for start, stop in runs))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
