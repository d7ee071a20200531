from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.data.batch import GROUP_OVERHEAD, Batch, by_length, collate, pack
from mlx_distributed.data.tokenize import Row

ROWS = st.lists(st.integers(2, 200), min_size=1, max_size=12).map(
    lambda lengths: [make_row(length, number) for number, length in enumerate(lengths)]
)


def make_row(length: int, number: int) -> Row:
    """Whose tokens are seen in no other row of a batch."""
    loss_mask = np.arange(length) % 3 == 1
    return Row(np.arange(length, dtype=np.int32) + 1000 * (number + 1), loss_mask)


def labels(batch: Batch) -> list[tuple[int, int]]:
    """Every target and the token before it."""
    at = np.argwhere(batch.loss_mask)
    assert (at[:, 1] > 0).all()
    return sorted((int(batch.tokens[row, place - 1]), int(batch.tokens[row, place])) for row, place in at)


@given(ROWS, st.sampled_from([1, 8]))
def test_every_target_follows_the_same_token_packed_or_not(rows: list[Row], multiple: int) -> None:
    expected = sorted(
        (int(row.tokens[at - 1]), int(row.tokens[at])) for row in rows for at in np.flatnonzero(row.loss_mask)
    )
    for batch in (collate(rows, multiple), pack(rows, multiple)):
        assert batch.tokens.dtype == np.int32
        assert batch.loss_mask.dtype == np.bool_
        assert batch.tokens.shape == batch.loss_mask.shape
        assert batch.tokens.shape[1] % multiple == 0
        assert labels(batch) == expected
        assert batch.num_labels == len(expected)


@given(ROWS, st.sampled_from([1, 8]))
def test_packed_rows_stand_where_the_groups_say(rows: list[Row], multiple: int) -> None:
    batch = pack(rows, multiple)
    assert batch.groups is not None
    assert batch.tokens.shape[0] == 1
    assert batch.tokens.size - sum(len(row.tokens) for row in rows) < multiple
    lengths = [length for group in batch.groups for length in group]
    assert sum(lengths) == batch.tokens.size - 1
    starts = np.cumsum([0, *lengths[:-1]])
    found = {int(batch.tokens[0, start]) for start in starts}
    assert found == {int(row.tokens[0]) for row in rows}
    for start, length in zip(starts, lengths, strict=True):
        row = next(row for row in rows if row.tokens[0] == batch.tokens[0, start])
        own = batch.tokens[0, start : start + min(length, len(row.tokens))]
        np.testing.assert_array_equal(own, row.tokens[: len(own)])


def test_rows_of_similar_length_are_a_group() -> None:
    rows = [make_row(length, number) for number, length in enumerate((300, 20, 21, 20, 298))]
    assert pack(rows).groups == ((20, 20, 21), (298, 299))
    assert pack([make_row(20, 0), make_row(20 + GROUP_OVERHEAD, 1)]).groups == ((20, 19 + GROUP_OVERHEAD),)


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_row_alone_is_laid_out_alike(multiple: int) -> None:
    row = make_row(13, 0)
    np.testing.assert_array_equal(collate([row], multiple).tokens, pack([row], multiple).tokens)
    np.testing.assert_array_equal(collate([row], multiple).loss_mask, pack([row], multiple).loss_mask)


@given(ROWS, st.integers(1, 5), st.none() | st.integers(1, 600))
def test_micro_batches_by_length_are_as_large_as_they_may_be(rows: list[Row], size: int, tokens: int | None) -> None:
    batches = by_length(rows, size, tokens)
    assert [row for batch in batches for row in batch] == sorted(rows, key=lambda row: len(row.tokens))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        if tokens is None:
            assert len(batch) == size or (following is None and len(batch) < size)
        else:
            assert len(batch) == 1 or len(batch) * len(batch[-1].tokens) <= tokens
            assert following is None or (len(batch) + 1) * len(following[0].tokens) > tokens
