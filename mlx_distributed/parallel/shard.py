"""`Shard`: the part of every parameter, gradient and moment that one rank owns, or has a copy of.

Source:
    the first stage of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_distributed.comm.buckets import Arrays, BucketLayout
from mlx_distributed.parallel.adamw import MOMENTS

Range = tuple[int, int]
"""Half-open, of the elements of a flat array."""


@dataclass(frozen=True)
class Shard:
    """What one rank owns: a slice of every bucket, and so a segment of each array in it.

    A segment is named as its array is, and flat. An array of which the rank owns nothing has none.
    """

    segments: tuple[Mapping[str, Range], ...]
    """By bucket, in its order: what is owned of each array."""
    slices: tuple[Range, ...]
    """By bucket: what is owned of it, in its elements."""

    @classmethod
    def of(cls, layout: Sequence[BucketLayout], slices: Sequence[Range]) -> Shard:
        """What a rank owns that has this slice of each bucket."""
        segments = (_segments(bucket, *owned) for bucket, owned in zip(layout, slices, strict=True))
        return cls(tuple(segments), tuple(slices))

    @property
    def ranges(self) -> dict[str, Range]:
        """What is owned of each array."""
        return {name: owned for bucket in self.segments for name, owned in bucket.items()}

    def cut(self, arrays: Mapping[str, mx.array]) -> Arrays:
        """Whole arrays -> segments, as views."""
        return {name: arrays[name].reshape(-1)[start:stop] for name, (start, stop) in self.ranges.items()}

    def split(self, slices: Sequence[mx.array]) -> Arrays:
        """Flat slices of all buckets -> segments, as views."""
        arrays: Arrays = {}
        for bucket, flat in zip(self.segments, slices, strict=True):
            at = 0
            for name, (start, stop) in bucket.items():
                arrays[name] = flat[at : at + stop - start]
                at += stop - start
        return arrays

    def join(self, segments: Arrays) -> list[mx.array]:
        """The inverse of `split`, which empties `segments`, so that they can be freed one by one."""
        pieces = [[segments.pop(name) for name in bucket] for bucket in self.segments]
        return [own[0] if len(own) == 1 else mx.concatenate([mx.zeros(0), *own]) for own in pieces]


@dataclass
class Part:
    """A shard and its moments."""

    shard: Shard
    moments: Arrays
    """`<name>.m` and `<name>.v` of each segment, flat, float32."""

    @classmethod
    def zeros(cls, layout: Sequence[BucketLayout], slices: Sequence[Range]) -> Part:
        """As before the first step, of this slice of each bucket."""
        shard = Shard.of(layout, slices)
        moments: Arrays = {}
        for name, (start, stop) in shard.ranges.items():
            moments |= {f"{name}.{moment}": mx.zeros(stop - start) for moment in MOMENTS}
        return cls(shard, moments)


def _segments(bucket: BucketLayout, start: int, stop: int) -> dict[str, Range]:
    segments, at = {}, 0
    for leaf in bucket.leaves:
        first, last = max(start - at, 0), min(stop - at, leaf.size)
        if first < last:
            segments[leaf.name] = (first, last)
        at += leaf.size
    return segments
