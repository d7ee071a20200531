"""Files that are written array by array hold what MLX writes, and take one array at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_distributed.models.tensor_file import Arriving, write_tensors

ARRAYS = {
    "bytes": mx.array([1, 2, 3], mx.uint8),
    "bf16": mx.arange(6).reshape(2, 3).astype(mx.bfloat16),
    "half": mx.array([[0.5], [mx.inf]], mx.float16),
    "turned": mx.arange(12, dtype=mx.float32).reshape(3, 4).T,
    "number": mx.array(7, mx.int64),
    "nothing": mx.zeros((0, 4)),
    "truth": mx.array([True, False]),
    "complex": mx.array([1 + 2j], mx.complex64),
    "größe": mx.array([1, 2**32 - 1], mx.uint32),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        write_tensors(opened, Arriving(ARRAYS, ARRAYS.values()))
    found, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name], array), name


def test_every_dtype_that_is_read_is_written(tmp_path: Path) -> None:
    for name, dtype in vars(mx).items():
        if isinstance(dtype, mx.Dtype) and dtype != mx.float64:  # which only the CPU has
            array = mx.ones((2,), dtype)
            with (tmp_path / name).open("wb") as opened:
                write_tensors(opened, Arriving({name: array}, [array]))
            assert mx.load(str(tmp_path / name), format="safetensors")[name].dtype == dtype


def test_an_array_is_asked_for_when_the_one_before_it_is_written() -> None:
    file, like = BytesIO(), {"a": mx.zeros((4,)), "b": mx.zeros((2,))}
    sizes: list[int] = []

    def arrive() -> Iterator[mx.array]:
        for array in like.values():
            sizes.append(file.tell())
            yield array + 1

    write_tensors(file, Arriving(like, arrive()))
    data = file.getvalue()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 8 == 0
    assert sizes == [begin, begin + 16]
    assert json.loads(data[8:begin])["b"]["data_offsets"] == [16, 24]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([mx.zeros((3,))], "a is mlx.core.float32"),
        ([mx.zeros((2,), mx.float16)], "a is mlx.core.float16"),
        ([], "shorter"),
        ([mx.zeros((2,))] * 2, "longer"),
    ],
)
def test_what_is_not_as_announced_is_refused(arrays: list[mx.array], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_tensors(BytesIO(), Arriving({"a": mx.zeros((2,))}, arrays))
