"""What passes between stages in fewer bits comes back in its shape and dtype, with an error that is known."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.train.rounding import on_wire, restored, rounded

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 32, 300]))


@given(
    shape=SHAPES,
    wire_dtype=st.sampled_from([mx.int8, mx.bfloat16, mx.float16]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_what_arrives_is_near(
    shape: tuple[int, ...], wire_dtype: mx.Dtype, dtype: mx.Dtype, scale: float, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale
    array = mx.array(values).astype(dtype)
    wire = rounded(array, wire_dtype)
    assert (wire.shape, wire.dtype) == on_wire(shape, wire_dtype)
    found = restored(wire, shape, dtype)
    assert (found.shape, found.dtype) == (shape, dtype)
    given, error = (np.asarray(each.astype(mx.float32)) for each in (array, found - array))
    # Half a step of 127 of the largest value; and what the dtypes themselves leave out.
    bound = np.abs(given).max() * (0.5 / 127 if wire_dtype == mx.int8 else 0.0) + np.abs(given) * 2**-7 + 1e-7
    assert (np.abs(error) <= bound).all()
    assert mx.array_equal(rounded(array, wire_dtype), wire)


@pytest.mark.parametrize("wire_dtype", [mx.int8, mx.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(wire_dtype: mx.Dtype, bad: float) -> None:
    values = np.ones((2, 300), np.float32)
    values[1, 7] = bad
    found = restored(rounded(mx.array(values), wire_dtype), (2, 300), mx.float32)
    assert not mx.isfinite(found).all().item()


def test_int8_takes_little_more_than_a_byte() -> None:
    assert on_wire((2, 128, 1024), mx.int8) == ((2 * 128 * 1024 + 2 * 128 * 4 * 4,), mx.uint8)
