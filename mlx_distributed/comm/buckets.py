"""Pytree <-> buckets: named arrays are put together into buckets of one dtype and of bounded size.

A bucket is what travels at a time. Buckets are ordered as the backward pass finishes them, from the last layer to the
first, so that the first can leave while the others are still being computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.compress import CODECS

BUCKET_BYTES = 4 << 20
"""2-8 MB hid most of the communication behind the backward pass when measured; larger ones start too late."""

BLOCK = 1 << 14
"""Elements. Within a bucket the slices of ranks begin at multiples of it, so that what is computed block by block does
not depend on who owns what."""

Arrays = dict[str, mx.array]
"""Arrays by name, as parameters, gradients and moments are kept."""
Bucket = list[mx.array]
"""The arrays of one bucket, in the order of its `Layout`."""

# MLX has no bfloat16 in numpy and sums travel in full precision, so a bucket holds one of these.
NUMPY_DTYPES: dict[mx.Dtype, type[np.generic]] = {
    mx.float32: np.float32,
    mx.int32: np.int32,
    mx.int64: np.int64,
}


@dataclass(frozen=True)
class Leaf:
    """Name and shape of one array."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class BucketLayout:
    """The arrays of one bucket: all of one dtype, laid out one after the other."""

    leaves: tuple[Leaf, ...]
    dtype: mx.Dtype
    wire: str = "fp32"
    """How float32 values travel: a key of `compress.CODECS`."""

    @property
    def lossy(self) -> bool:
        """Not all of a value travels."""
        return self.dtype == mx.float32 and not CODECS[self.wire].exact

    @property
    def size(self) -> int:
        """Elements."""
        return sum(leaf.size for leaf in self.leaves)

    def pack(self, arrays: Bucket) -> np.ndarray:
        """Evaluated arrays -> one flat host buffer of `size` elements, a view where there is one array."""
        flat = [np.asarray(array).reshape(-1) for array in arrays]
        return flat[0] if len(flat) == 1 else np.concatenate(flat)

    def empty(self, num_elements: int) -> tuple[mx.array, np.ndarray]:
        """A flat array of so many elements, whatever they are, and a view of its memory, to be written to before
        anything is computed with the array: to copy a result into MLX would take its time after the last byte came."""
        # No operation of MLX: to evaluate one costs 50 us, however small it is.
        flat = mx.array(np.empty(num_elements, NUMPY_DTYPES[self.dtype]))
        return flat, np.asarray(flat)

    def split(self, flat: mx.array) -> Bucket:
        """Flat array of `size` elements -> views of it, not yet evaluated."""
        stops = np.cumsum([leaf.size for leaf in self.leaves])
        return [
            flat[stop - leaf.size : stop].reshape(leaf.shape)
            for leaf, stop in zip(self.leaves, stops.tolist(), strict=True)
        ]


def backward_order(names: Sequence[str]) -> list[str]:
    """Names in the order in which their gradients become ready: head and final norm, layers from the last, embeddings.

    Only speed depends on this order; every rank must use the same one, and it depends on the names alone.
    """

    def key(name: str) -> tuple[int, int, str]:
        layer = layer_of(name)
        if layer is not None:
            return (1, -layer, name)
        return (2 if "embed" in name else 0, 0, name)

    return sorted(names, key=key)


def layer_of(name: str) -> int | None:
    """The number of the layer that an array belongs to, by its name; None where it belongs to none."""
    layer = re.search(r"\blayers\.(\d+)\.", name)
    return int(layer.group(1)) if layer else None


def make_layout(
    arrays: Mapping[str, mx.array], bucket_bytes: int = BUCKET_BYTES, wire: str = "fp32"
) -> tuple[BucketLayout, ...]:
    """Group named arrays, in the order given, into buckets of one dtype and of at most `bucket_bytes`.

    An array larger than that gets a bucket of its own. `wire` is how float32 values are to travel.
    """
    buckets: list[tuple[list[Leaf], mx.Dtype, int]] = []
    for name, array in arrays.items():
        if array.dtype not in NUMPY_DTYPES:
            raise TypeError(f"{name} is {array.dtype}; sums travel as {', '.join(str(d) for d in NUMPY_DTYPES)}")
        leaf = Leaf(name, tuple(array.shape))
        if buckets and buckets[-1][1] == array.dtype and buckets[-1][2] + array.nbytes <= bucket_bytes:
            leaves, dtype, num_bytes = buckets.pop()
            buckets.append(([*leaves, leaf], dtype, num_bytes + array.nbytes))
        else:
            buckets.append(([leaf], array.dtype, array.nbytes))
    return tuple(BucketLayout(tuple(leaves), dtype, wire) for leaves, dtype, _ in buckets)


def to_buckets(layout: Sequence[BucketLayout], arrays: Mapping[str, mx.array]) -> list[Bucket]:
    """Named arrays -> buckets."""
    return [[arrays[leaf.name] for leaf in bucket.leaves] for bucket in layout]


def from_buckets(layout: Sequence[BucketLayout], buckets: Sequence[Bucket]) -> dict[str, mx.array]:
    """Buckets -> named arrays."""
    return {
        leaf.name: array
        for shape, bucket in zip(layout, buckets, strict=True)
        for leaf, array in zip(shape.leaves, bucket, strict=True)
    }
