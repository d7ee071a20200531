"""What travels: frames of a fixed header and raw bytes, and arrays as frames.

Frames are not protobuf messages: a `bytes` field costs a copy at each end and made an allreduce 2-4 times slower.
All numbers are little-endian, as are the tensors of every machine that MLX runs on.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

CHUNK_BYTES = 1 << 20
"""Of payload per frame. Below 512 KiB the fixed cost per gRPC message shows, above 2 MiB nothing is gained."""

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(mx.bool_, mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64),
        *(mx.float16, mx.bfloat16, mx.float32, mx.float64, mx.complex64),
    )
}
"""By the names that they travel with."""

_HEADER = struct.Struct("<QBxxxIIIIII")
HEADER_BYTES = _HEADER.size
MAX_FRAME_BYTES = CHUNK_BYTES + HEADER_BYTES
SMALL_BYTES = 32 << 10
"""Frames that wait together travel as one message while they are smaller than this: a message has a fixed cost."""
MAX_MESSAGE_BYTES = SMALL_BYTES + MAX_FRAME_BYTES
"""A larger message is refused by the transport before it is read."""


class Kind(enum.IntEnum):
    """What a frame is."""

    PART = 1
    """One chunk of one partial sum, to the rank that owns the slice."""
    END = 2
    """The sender has sent all its parts of this operation."""
    RESULT = 3
    """One chunk of a finished slice, from its owner."""
    MESSAGE = 4
    """One chunk of an array, point to point."""
    ABORT = 5
    """The sender has failed and leaves; the payload says why."""
    BYE = 6
    """The sender leaves in peace."""
    WAITING = 7
    """The sender waits for a rank that is silent; the payload says for which."""


class Frame(NamedTuple):
    """One frame; what the numbers mean depends on the kind.

    PART: op, bucket, chunk, node = (lo, hi). RESULT: op, bucket, chunk. END: op. MESSAGE: op = tag, chunk, and
    hi = number of chunks; the first chunk holds dtype and shape.
    """

    kind: Kind
    op: int = 0
    bucket: int = 0
    chunk: int = 0
    lo: int = 0
    hi: int = 0
    payload: bytes | memoryview = b""


NOT_AS_EXPECTED = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""What taking JSON of a peer apart can raise."""


class FrameError(ValueError):
    """Bytes that are not a frame of this group."""


def group_tag(run_id: str, generation: int) -> int:
    """64 bits that every frame of one run and generation begins with."""
    return int.from_bytes(hashlib.sha256(f"{run_id}/{generation}".encode()).digest()[:8], "little")


def encode(tag: int, frame: Frame) -> bytes:
    """Frame -> bytes: the only copy that we make on the way out. A message is one frame after the other."""
    kind, op, bucket, chunk, lo, hi, payload = frame
    return b"".join((_HEADER.pack(tag, kind, op, bucket, chunk, lo, hi, len(payload)), payload))


class Message:
    """A frame in the queues of one or several peers: its bytes are made once, when the first of them takes it."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._data: bytes | None = None

    def encoded(self, tag: int) -> bytes:
        """The bytes, with the tag of the group."""
        self._data = self._data or encode(tag, self.frame)
        return self._data


def decode(tag: int, data: bytes) -> Iterator[Frame]:
    """Message -> its frames, whose payloads are views of it.

    Raises:
        FrameError: too short, of another run or generation, or of no known kind.
    """
    at = 0
    while at < len(data) or not data:
        if len(data) - at < HEADER_BYTES:
            raise FrameError(f"sent {len(data) - at} bytes, which is no frame")
        theirs, kind, op, bucket, chunk, lo, hi, num_bytes = _HEADER.unpack_from(data, at)
        if theirs != tag:
            raise FrameError("sent a frame of another run or generation")
        at += HEADER_BYTES
        if len(data) - at < num_bytes:
            raise FrameError(f"sent {len(data) - at} of the {num_bytes} bytes of a frame")
        try:
            yield Frame(Kind(kind), op, bucket, chunk, lo, hi, memoryview(data)[at : at + num_bytes])
        except ValueError:
            raise FrameError(f"sent a frame of unknown kind {kind}") from None
        at += num_bytes


def array_to_chunks(array: mx.array) -> list[bytes | memoryview]:
    """Evaluated array of any dtype -> first its dtype and shape, then its bytes in chunks."""
    meta = json.dumps({"dtype": str(array.dtype), "shape": array.shape}).encode()
    # numpy knows no bfloat16; as bytes every dtype is alike. `contiguous` because a view may have strides.
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8) if array.size else mx.zeros(0, mx.uint8)
    body = np.asarray(flat).data.cast("B")
    return [meta, *(body[i : i + CHUNK_BYTES] for i in range(0, len(body), CHUNK_BYTES))]


def array_from_chunks(chunks: list[bytes | memoryview]) -> mx.array:
    """The inverse of `array_to_chunks`; evaluated.

    Raises:
        FrameError: the dtype is unknown, or the bytes are not those of the shape.
    """
    try:
        meta = json.loads(bytes(chunks[0]))
        dtype, shape = DTYPES[meta["dtype"]], [int(n) for n in meta["shape"]]
        if any(not 0 <= n < 1 << 31 for n in shape):  # MLX counts dimensions in 32 bits
            raise ValueError(meta)
    except NOT_AS_EXPECTED as error:
        raise FrameError(f"sent an array of unknown dtype or shape ({error})") from None
    body = np.frombuffer(b"".join(chunks[1:]), np.uint8)
    if body.size != math.prod(shape) * dtype.size:
        raise FrameError(f"sent {body.size} bytes for an array of {dtype}{tuple(shape)}")
    array = mx.array(body).view(dtype).reshape(shape) if body.size else mx.zeros(shape, dtype)
    mx.eval(array)  # What is not evaluated belongs to the thread that made it.
    return array
