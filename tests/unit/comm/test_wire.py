from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_distributed.comm.wire import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    Frame,
    FrameError,
    Kind,
    array_from_chunks,
    array_to_chunks,
    decode,
    encode,
    group_tag,
)

TAG = group_tag("run", 3)


def test_a_frame_there_and_back() -> None:
    frame = Frame(Kind.PART, op=7, bucket=2, chunk=5, lo=4, hi=6, payload=b"abc")
    (back,) = decode(TAG, encode(TAG, frame))
    assert back == frame
    assert back.kind is Kind.PART


def test_frames_that_travel_together() -> None:
    frames = [Frame(Kind.PART, 1, payload=b"abc"), Frame(Kind.END, 1), Frame(Kind.MESSAGE, 2, hi=1, payload=b"")]
    assert list(decode(TAG, b"".join(encode(TAG, frame) for frame in frames))) == frames


def test_the_largest_frame_is_within_the_limit() -> None:
    assert len(encode(TAG, Frame(Kind.RESULT, payload=b"\0" * CHUNK_BYTES))) == MAX_FRAME_BYTES


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no frame"),
        (b"GET / HTTP/1.1\r\n", "no frame"),
        (encode(group_tag("run", 2), Frame(Kind.END)), "another run or generation"),
        (encode(group_tag("other", 3), Frame(Kind.END)), "another run or generation"),
        (encode(TAG, Frame(99)), "unknown kind 99"),  # type: ignore[arg-type]
        (encode(TAG, Frame(Kind.END)) + b"x", "1 bytes, which is no frame"),
        (encode(TAG, Frame(Kind.PART, payload=b"abc"))[:-1], "2 of the 3 bytes"),
    ],
)
def test_what_is_not_a_frame_of_this_group_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        list(decode(TAG, data))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int64, mx.uint8, mx.bool_])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (600, 1000)])
def test_an_array_there_and_back(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    array = (mx.random.normal(shape) * 100).astype(dtype)
    chunks = array_to_chunks(array)
    assert all(len(chunk) <= CHUNK_BYTES for chunk in chunks)
    back = array_from_chunks(chunks)
    assert back.dtype == dtype
    assert back.shape == shape
    assert mx.array_equal(back, array)


def test_a_view_with_strides_travels_as_it_looks() -> None:
    array = mx.arange(12, dtype=mx.int32).reshape(3, 4).T[1:]
    assert mx.array_equal(array_from_chunks(array_to_chunks(array)), array)


@pytest.mark.parametrize(
    "chunks",
    [
        [b"not json"],
        [b"[]"],
        [b'{"dtype": "mlx.core.float32"}'],
        [b'{"dtype": "exec", "shape": [1]}', b"1234"],
        [b'{"dtype": "core", "shape": [1]}', b"1234"],
        [b'{"dtype": "mlx.core.float32", "shape": [-1]}', b"1234"],
        [b'{"dtype": "mlx.core.float32", "shape": ["x"]}', b"1234"],
        [b'{"dtype": "mlx.core.float32", "shape": [2]}', b"1234"],
        [b'{"dtype": "mlx.core.float32", "shape": [0, 1099511627776]}'],
        [b'{"dtype": "mlx.core.float32", "shape": [1e999]}'],
        [b"[" * 100_000],
        [b'{"dtype": "mlx.core.float32", "shape": [99999999999]}', b"1234"],
    ],
)
def test_a_malformed_array_is_refused(chunks: list[bytes | memoryview]) -> None:
    with pytest.raises(FrameError):
        array_from_chunks(chunks)
