"""Files in the safetensors format that are written array by array, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

_DTYPES = {
    mx.bool_: "BOOL",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
    mx.float64: "F64",
    mx.complex64: "C64",
}
_ALIGNMENT = 8


class Writable(Protocol):
    """A file that is written from its begin to its end."""

    def write(self, data: bytes | memoryview, /) -> object:
        """As of a binary file."""
        ...


class Arriving(NamedTuple):
    """Arrays that are there one after the other, each when it is asked for."""

    like: Mapping[str, mx.array]
    """Their names, shapes and dtypes, in their order; these are not evaluated."""
    arrays: Iterable[mx.array]


def write_tensors(file: Writable, given: Arriving) -> None:
    """Write arrays as `mx.load` and every other reader of safetensors takes them.

    Raises:
        ValueError: an array is not what `like` says, or there are fewer or more of them.
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, array in given.like.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, due), array in zip(given.like.items(), given.arrays, strict=True):
        if array.shape != due.shape or array.dtype != due.dtype:
            raise ValueError(f"{name} is {array.dtype}{array.shape} and not {due.dtype}{due.shape}")
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        file.write(np.asarray(flat).data)
        del array, flat
