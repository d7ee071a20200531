from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.comm.buckets import backward_order, from_buckets, make_layout, to_buckets


def test_buckets_hold_one_dtype_and_a_bounded_size() -> None:
    arrays = {
        "a": mx.zeros((4, 4)),
        "b": mx.zeros(8),
        "c": mx.zeros(9),
        "large": mx.zeros(100),
        "n": mx.zeros(1, mx.int64),
        "d": mx.zeros(1),
    }
    layout = make_layout(arrays, bucket_bytes=96)
    assert [[leaf.name for leaf in bucket.leaves] for bucket in layout] == [["a", "b"], ["c"], ["large"], ["n"], ["d"]]
    assert [bucket.size for bucket in layout] == [24, 9, 100, 1, 1]


shapes = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6)


@given(shapes, st.integers(1, 200))
def test_there_and_back(shapes: list[list[int]], bucket_bytes: int) -> None:
    arrays = {f"p{i}": mx.random.normal(shape) for i, shape in enumerate(shapes)}
    layout = make_layout(arrays, bucket_bytes)
    packed = [bucket.pack(arrays) for bucket, arrays in zip(layout, to_buckets(layout, arrays), strict=True)]
    back = from_buckets(layout, [bucket.split(mx.array(flat)) for bucket, flat in zip(layout, packed, strict=True)])
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        assert np.array_equal(np.asarray(back[name]), np.asarray(array))


def test_a_transposed_array_is_packed_by_rows() -> None:
    array = mx.arange(6, dtype=mx.float32).reshape(2, 3).T
    (bucket,) = make_layout({"t": array})
    assert bucket.pack([array]).tolist() == [0, 3, 1, 4, 2, 5]


def test_the_last_layer_goes_first() -> None:
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.mlp.weight" for i in (0, 2, 10)]
    assert backward_order(names) == [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.10.mlp.weight",
        "model.layers.2.mlp.weight",
        "model.layers.0.mlp.weight",
        "model.embed_tokens.weight",
    ]


def test_sums_do_not_travel_in_16_bits() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        make_layout({"w": mx.zeros(2, mx.bfloat16)})
