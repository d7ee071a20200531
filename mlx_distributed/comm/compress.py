"""Wire formats: what a chunk of a float32 bucket looks like while it travels, and what that leaves out.

`fp32` sends the values as they are, and the sum stays canonical. The others send fewer bits. They are deterministic,
and all ranks get the same result, but it is no longer the exact sum and depends on who sent what. What rounding left
out is kept by `Feedback` and added to what is sent next, so that it is late and not lost (Seide et al. 2014, "1-bit
stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes SignSGD").
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

Payload = bytes | memoryview


class Codec(Protocol):
    """Flat values <-> bytes."""

    @property
    def exact(self) -> bool:
        """What is decoded is what was encoded, bit for bit."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """Of values that travel as one frame."""
        ...

    def num_bytes(self, num_elements: int) -> int:
        """Of so many encoded elements."""
        ...

    def encode(self, values: np.ndarray) -> Payload:
        """Contiguous values -> bytes; for an exact codec a view of the values, which must not change afterwards."""
        ...

    def decode(self, payload: Payload, num_elements: int) -> np.ndarray:
        """`num_bytes(num_elements)` bytes -> values, which may be a read-only view. Any bytes decode to something, and
        what was not finite is not finite."""
        ...


@dataclass(frozen=True)
class Raw:
    """The values as they are, of any dtype."""

    dtype: np.dtype
    exact: bool = True
    chunk_bytes: int = 1 << 20

    def num_bytes(self, num_elements: int) -> int:
        return num_elements * self.dtype.itemsize

    def encode(self, values: np.ndarray) -> Payload:
        return values.data.cast("B")

    def decode(self, payload: Payload, num_elements: int) -> np.ndarray:
        return np.frombuffer(payload, self.dtype)


@dataclass(frozen=True)
class BFloat16:
    """The upper half of a float32, rounded to nearest, ties to even: all of its range, 8 bits of its precision."""

    exact: bool = False
    chunk_bytes: int = 2 << 20

    def num_bytes(self, num_elements: int) -> int:
        return 2 * num_elements

    def encode(self, values: np.ndarray) -> Payload:
        bits = values.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        nan = np.isnan(values)
        if nan.any():  # Rounding would carry some of them into infinity or zero.
            rounded[nan] = 0x7FC0
        return rounded.astype(np.uint16).data.cast("B")

    def decode(self, payload: Payload, num_elements: int) -> np.ndarray:
        bits = np.frombuffer(payload, np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)


@dataclass(frozen=True)
class Float16:
    """IEEE half precision of the values divided by a power of two, which is sent with each chunk: sums of gradients
    over tokens would leave its range by themselves."""

    exact: bool = False
    chunk_bytes: int = (2 << 20) - 8  # with the scale, no larger than another frame

    def num_bytes(self, num_elements: int) -> int:
        return 4 + 2 * num_elements

    def encode(self, values: np.ndarray) -> Payload:
        largest = np.abs(values).max(initial=0.0)
        exponent = int(np.frexp(largest)[1]) - 15 if np.isfinite(largest) else 0  # now below 2 ** 15
        exponent = max(exponent, -125)
        with np.errstate(under="ignore", over="ignore"):
            halves = (values * np.float32(2.0**-exponent)).astype(np.float16)
        return b"".join((np.float32(2.0**exponent).tobytes(), halves.data.cast("B")))

    def decode(self, payload: Payload, num_elements: int) -> np.ndarray:
        scale = np.frombuffer(payload, np.float32, 1)
        with np.errstate(all="ignore"):
            return np.frombuffer(payload, np.float16, offset=4).astype(np.float32) * scale


@dataclass(frozen=True)
class Integer:
    """Blocks of `block` values as signed integers of `bits` bits, with one float32 scale per block, by which its
    largest value becomes the largest integer. A block with a value that is not finite decodes to no finite one."""

    bits: int
    block: int
    exact: bool = False
    chunk_bytes: int = 2 << 20

    def num_bytes(self, num_elements: int) -> int:
        num_blocks = -(-num_elements // self.block)
        return 4 * num_blocks + num_blocks * self.block * self.bits // 8

    def encode(self, values: np.ndarray) -> Payload:
        largest = (1 << (self.bits - 1)) - 1
        rest = -values.size % self.block
        padded = np.append(values, np.zeros(rest, np.float32)) if rest else values
        magnitudes = _block_maxima(np.abs(padded), self.block)
        scales = magnitudes * np.float32(1 / largest)
        with np.errstate(all="ignore"):
            # A block so small that its inverse might overflow counts as zero: feedback keeps it.
            inverse = np.where(scales > _SMALLEST_SCALE, 1 / scales, np.float32(0))
            steps = padded.reshape(-1, self.block) * inverse[:, None]
            steps += _TO_INTEGER
        whole = steps.view(np.int32).astype(np.int8).reshape(-1)
        if self.bits == 4:
            whole = _pack(whole)
        return b"".join((scales.data.cast("B"), whole.data.cast("B")))

    def decode(self, payload: Payload, num_elements: int) -> np.ndarray:
        num_blocks = -(-num_elements // self.block)
        scales = np.frombuffer(payload, np.float32, num_blocks)
        whole = np.frombuffer(payload, np.int8, offset=4 * num_blocks)
        with np.errstate(all="ignore"):
            if self.bits == 4:
                whole, scales = _unpack(whole), scales * np.float32(1 / 16)
            decoded = np.multiply(whole.reshape(-1, self.block), scales[:, None], dtype=np.float32)
        return decoded.reshape(-1)[:num_elements]


_SMALLEST_SCALE = np.float32(1e-30)
_TO_INTEGER = np.float32(3 << 22)
"""Added to a float32 below 2 ** 22, it leaves the nearest integer, ties to even, in the low bits: `rint` is slower."""
_LOWER_HALVES = np.uint32(0x0F0F0F0F)
"""Of the bytes of a word: numpy takes a quarter of the time for words of that for bytes."""


def _block_maxima(values: np.ndarray, block: int) -> np.ndarray:
    """The largest value of each block; NaN where there is one."""
    if not values.size:
        return values
    if block > 64:  # Half the time of a reduction along the rows, but 50 ns for each block.
        return np.maximum.reduceat(values, np.arange(0, values.size, block))
    width = block
    while width > 8:  # Laid over itself, the largest value of a block is among its first `width`.
        width //= 2
        values = np.maximum(values[:-width], values[width:])
    return functools.reduce(np.maximum, [values[start::block] for start in range(width)])


def _pack(whole: np.ndarray) -> np.ndarray:
    """4-bit integers as bytes, those of the first half of the values in the lower halves: to pair neighbours takes
    longer."""
    lower, upper = np.split(whole.view(np.uint32), 2)
    return ((lower & _LOWER_HALVES) | (upper << 4 & ~_LOWER_HALVES)).view(np.int8)


def _unpack(packed: np.ndarray) -> np.ndarray:
    """The same integers, 16 times as large: in the upper half of a byte they have their sign."""
    words = packed.view(np.uint32)
    return (np.concatenate((words << 4, words)) & ~_LOWER_HALVES).view(np.int8)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "fp32": Raw(np.dtype(np.float32)),
        "bf16": BFloat16(),
        "fp16": Float16(),
        "int8": Integer(bits=8, block=256),
        "int4": Integer(bits=4, block=64),
    }
)
"""By `parallel.wire`."""


def codec_for(wire: str, dtype: np.dtype) -> Codec:
    """How a bucket travels. Only float32 is ever compressed."""
    return CODECS[wire] if dtype == np.float32 else Raw(dtype)


class Feedback:
    """What rounding has left out of this rank's part in the sums so far, by bucket: flat float32 buffers.

    An operation adds it to what it sends and notes what it leaves out itself; that takes effect with `commit`, so that
    a step that fails or is skipped leaves it as it was. Where in a buffer a value stands is all that matters, not who
    owned that slice: the buffers of several ranks can be added up and handed to one of them.
    """

    def __init__(self) -> None:
        self.residual: dict[int, np.ndarray] = {}
        self._next: dict[int, np.ndarray] = {}
        self._first = 0

    def part(self, first: int) -> Feedback:
        """The same buffers, for an operation on the buckets from number `first` on: it counts them from 0."""
        part = Feedback()
        part.residual, part._next, part._first = self.residual, self._next, self._first + first
        return part

    def owed(self, index: int, num_elements: int) -> np.ndarray:
        """The buffer of bucket `index`, zeros where nothing was left out."""
        owed = self.residual.get(self._first + index)
        return np.zeros(num_elements, np.float32) if owed is None else owed

    def begin(self, index: int, num_elements: int) -> tuple[np.ndarray | None, np.ndarray]:
        """The buffer to add to what bucket `index` sends (None: nothing), and the one for what that leaves out."""
        old = self.residual.get(self._first + index)
        new = np.zeros(num_elements, np.float32) if old is None else old.copy()
        self._next[self._first + index] = new
        return old, new

    def commit(self) -> None:
        """What the operations since the last commit have left out is what is owed now."""
        self.residual.update(self._next)
        self._next.clear()

    def discard(self) -> None:
        """Those operations have not happened."""
        self._next.clear()
