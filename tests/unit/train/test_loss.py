from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_samples import TinyModel, make_rows

from mlx_distributed.comm.buckets import BLOCK
from mlx_distributed.comm.reduction import slices
from mlx_distributed.data.batch import collate
from mlx_distributed.data.tokenize import Row
from mlx_distributed.train.loss import block_sums, global_norm, summed_loss


def arrays(rows: list[Row]) -> tuple[mx.array, mx.array]:
    batch = collate(rows)
    return mx.array(batch.tokens), mx.array(batch.loss_mask)


def by_hand(model: nn.Module, rows: list[Row]) -> float:
    """Row by row and token by token, in float64."""
    total = 0.0
    for row in rows:
        logits = np.asarray(model(mx.array(row.tokens[None])), np.float64)[0]
        for at in np.flatnonzero(row.loss_mask):
            scores = logits[at - 1]
            total += math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row.tokens[at]]
    return total


@pytest.fixture
def model() -> TinyModel:
    mx.random.seed(0)
    return TinyModel()


@pytest.mark.parametrize("num_rows", [1, 7])
def test_it_is_the_sum_over_the_targets(model: TinyModel, num_rows: int) -> None:
    rows = make_rows(num_rows)
    loss = summed_loss(model, *arrays(rows))
    assert (loss.dtype, loss.shape) == (mx.float32, ())
    assert loss.item() == pytest.approx(by_hand(model, rows), rel=1e-6)


def test_padding_has_no_part_in_loss_and_gradient(model: TinyModel) -> None:
    rows = make_rows(4)
    tokens, loss_mask = arrays(rows)
    wider = mx.pad(tokens, ((0, 0), (0, 5)), constant_values=3), mx.pad(loss_mask, ((0, 0), (0, 5)))
    loss_and_gradient = nn.value_and_grad(model, lambda tokens, mask: summed_loss(model, tokens, mask))
    (loss, gradient), (wide_loss, wide_gradient) = loss_and_gradient(tokens, loss_mask), loss_and_gradient(*wider)
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, expected), (_, found) in zip(
        nn.utils.tree_flatten(gradient), nn.utils.tree_flatten(wide_gradient), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_no_target_may_be_anything(model: TinyModel) -> None:
    """Where the logits overflow, a mask that multiplies would give 0 * inf."""
    rows = [Row(np.array([1, 2, 3, 4], np.int32), np.array([False, True, False, False]))]
    expected = summed_loss(model, *arrays(rows)).item()
    model.embed.weight[3] = math.nan
    assert math.isfinite(expected)
    assert summed_loss(model, *arrays(rows)).item() == expected


def test_logits_of_half_precision_are_summed_in_float32(model: TinyModel) -> None:
    rows = make_rows(20) * 20
    expected = by_hand(model, rows)
    model.set_dtype(mx.bfloat16)
    assert expected > 1000  # neighbouring bfloat16 numbers are 8 apart there
    assert summed_loss(model, *arrays(rows)).item() == pytest.approx(expected, rel=2e-3)


def norm_of(buckets: list[list[mx.array]]) -> mx.array:
    return global_norm([block_sums(bucket) for bucket in buckets])


@given(st.lists(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=3), min_size=1, max_size=3))
def test_the_norm_is_that_of_numpy(shapes: list[list[list[int]]]) -> None:
    random = np.random.default_rng(0)
    buckets = [[random.standard_normal(shape).astype(np.float32) for shape in bucket] for bucket in shapes]
    norm = norm_of([[mx.array(array) for array in bucket] for bucket in buckets])
    assert (norm.dtype, norm.shape) == (mx.float32, ())
    flat = np.concatenate([array.reshape(-1).astype(np.float64) for bucket in buckets for array in bucket])
    assert norm.item() == pytest.approx(np.linalg.norm(flat), rel=1e-6)


@given(st.lists(st.integers(0, 5 * BLOCK), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_bits_of_the_norm_do_not_depend_on_who_owns_what(sizes: list[int], num_ranks: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    flats = [mx.array(random.standard_normal(size, np.float32)) for size in sizes]
    shares = random.dirichlet(np.ones(num_ranks)).tolist()
    pieces = [
        block_sums([flat[start:stop]])
        for index, flat in enumerate(flats)
        for start, stop in slices(flat.size, shares, index)
    ]
    whole = norm_of([[flat] for flat in flats])
    in_arrays = norm_of([mx.split(flat, [flat.size // 3]) for flat in flats])
    assert global_norm(pieces).item() == whole.item() == in_arrays.item()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_gradient_that_is_not_finite_has_no_finite_norm(value: float) -> None:
    array = mx.zeros(3 * BLOCK + 5)
    array[BLOCK + 7] = value
    assert not math.isfinite(norm_of([[mx.zeros(7)], [array]]).item())


def test_the_norm_of_many_elements_is_as_exact_as_that_of_few() -> None:
    """MLX adds a flat array on a CPU from one end to the other, which loses digits."""
    values = [np.random.default_rng(2).standard_normal(size).astype(np.float32) for size in (1 << 20, (1 << 20) + 777)]
    norm = norm_of([[mx.array(value)] for value in values]).item()
    assert norm == pytest.approx(math.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in values)), rel=1e-6)
