"""Files of single ranks in a checkpoint: how what is in them is named, and moments put together from segments."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import mlx.core as mx

from mlx_distributed.comm.buckets import Arrays

FEEDBACK = "feedback/"
"""Before the name of a parameter: what compression has left out of its gradient on this rank."""
COPY = "copy/"
"""Before the name of anything that belongs to a worker's own copy of what is trained."""
PENDING = "pending/"
"""Before the name of anything that was summed and not applied yet; in the file of rank 0 alone."""
STAGE_PARAMETERS, STAGE_OPTIMIZER = "stage-parameters/", "stage-optimizer/"
"""Before the name of what is on one worker of a pipeline."""
SEGMENT = "moments/"
"""Before the name of a moment and where in the flat array the segment begins, as in `moments/head.weight.m@16384`."""

_PATTERN = re.compile(rf"{SEGMENT}(.+)@([0-9]{{1,18}})")


def segment_name(moment: str, start: int) -> str:
    """The name in the file of a rank of a flat segment of a moment."""
    return f"{SEGMENT}{moment}@{start}"


def merge(segments: Iterable[tuple[str, mx.array]], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Segments of all ranks, in any order -> whole moments, not yet evaluated.

    Args:
        segments: name, as from `segment_name`, and flat float32 array.
        shapes: of every moment by its name.

    Raises:
        ValueError: the segments are not just those that make up these moments.
    """
    pieces: defaultdict[str, list[tuple[int, mx.array]]] = defaultdict(list)
    for name, array in segments:
        match = _PATTERN.fullmatch(name)
        if match is None or match[1] not in shapes:
            raise ValueError(f"{name!r} is not a segment of a moment")
        if array.ndim != 1 or array.dtype != mx.float32:
            raise ValueError(f"{name} is {array.dtype}{tuple(array.shape)} and no flat segment")
        pieces[match[1]].append((int(match[2]), array))
    return {name: _put_together(name, pieces[name], shape) for name, shape in shapes.items()}


def _put_together(name: str, pieces: list[tuple[int, mx.array]], shape: tuple[int, ...]) -> mx.array:
    pieces.sort(key=lambda piece: piece[0])
    at = 0
    for start, array in pieces:
        if start != at:
            raise ValueError(f"a segment of {name} begins at {start}, where one at {at} is due")
        at += array.size
    if at != math.prod(shape):
        raise ValueError(f"the segments of {name} have {at} of {math.prod(shape)} elements")
    return mx.concatenate([mx.zeros(0), *(array for _, array in pieces)]).reshape(shape)
