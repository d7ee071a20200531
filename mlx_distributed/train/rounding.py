"""What passes between the stages of a pipeline, in fewer bits: as another floating dtype, or as `int8`.

`int8` is the wire format of that name for gradients (`comm.compress`): blocks of 256 values, each with a scale. What
rounding leaves out of a hidden state or of its gradient is lost, as the next one is of other tokens.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.compress import CODECS

_INT8 = CODECS["int8"]


def rounded(array: mx.array, wire_dtype: mx.Dtype) -> mx.array:
    """An array of any shape, as it travels."""
    if wire_dtype != mx.int8:
        return array.astype(wire_dtype)
    values = np.asarray(mx.contiguous(array.astype(mx.float32)).reshape(-1))
    return mx.array(np.frombuffer(_INT8.encode(values), np.uint8))


def on_wire(shape: tuple[int, ...], wire_dtype: mx.Dtype) -> tuple[tuple[int, ...], mx.Dtype]:
    """Shape and dtype that an array of this shape travels in."""
    if wire_dtype != mx.int8:
        return shape, wire_dtype
    return (_INT8.num_bytes(math.prod(shape)),), mx.uint8


def restored(wire: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """What has travelled as `on_wire` says, in the shape and the dtype that it had. Any bytes give something, and what
    was not finite is not finite."""
    if wire.dtype == mx.uint8:
        values = _INT8.decode(np.asarray(wire).data, math.prod(shape))
        wire = mx.array(values).reshape(shape)
    return wire.astype(dtype)
