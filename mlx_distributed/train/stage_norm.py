"""The norm of a gradient that is spread over the stages of a pipeline, with the bits that it has on one worker.

It is made of sums of squares over blocks of the buckets of the whole model (`loss.block_sums`), in their order. A block
that lies on one stage is summed there. Of a block that a border between stages cuts, every stage gives its elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BLOCK, Arrays, BucketLayout
from mlx_distributed.errors import CommError
from mlx_distributed.train.loss import block_sums


class _Piece(NamedTuple):
    """Neighbouring elements of a bucket that are on one stage."""

    stage: int
    start: int
    stop: int
    names: tuple[str, ...]
    """Of the arrays of the run that it is cut from."""
    offset: int
    """In that run, where it begins."""
    cut: bool
    """It is a part of one block; else it is whole blocks."""

    @property
    def size(self) -> int:
        """What is given of it: elements, or one sum for each block."""
        return self.stop - self.start if self.cut else -(-(self.stop - self.start) // BLOCK)


class StageNorm:
    """Of gradients of one layout.

    Args:
        layout: of the buckets of the whole model.
        stage_of: by name of an array, the stage that counts it.
    """

    def __init__(self, layout: Sequence[BucketLayout], stage_of: Mapping[str, int]) -> None:
        self._pieces = [_cut(bucket, stage_of) for bucket in layout]

    def gather(self, gradients: Arrays, stage: int, what: str, comm: Communicator) -> list[mx.array]:
        """`block_sums` of every bucket of the whole model, in order.

        Args:
            gradients: of this stage, among others.
            stage: that this rank counts.
            what: names them in errors.
            comm: whose ranks are the stages.

        Raises:
            CommError: a peer is lost, or gave something else.
        """
        given = [_given(piece, gradients) for piece in self._of(stage)]
        mine = mx.concatenate([mx.zeros(0), *given])
        mx.eval(mine)
        gathered = comm.all_gather(mine, what)
        values = {}
        for other, array in enumerate(gathered):
            due = sum(piece.size for piece in self._of(other))
            if array.shape != (due,) or array.dtype != mx.float32:
                reason = f"sent {array.dtype}{tuple(array.shape)} where {due} sums of squares were due"
                raise CommError(f"all_gather of {what}", other, comm.generation, 0.0, reason)
            at = 0
            for piece in self._of(other):
                values[piece], at = array[at : at + piece.size], at + piece.size
        return [_put_together(pieces, values) for pieces in self._pieces]

    def _of(self, stage: int) -> list[_Piece]:
        return [piece for pieces in self._pieces for piece in pieces if piece.stage == stage]


def _cut(bucket: BucketLayout, stage_of: Mapping[str, int]) -> list[_Piece]:
    pieces, lo = [], 0
    for stage, leaves in groupby(bucket.leaves, key=lambda leaf: stage_of[leaf.name]):
        run = list(leaves)
        names, hi = tuple(leaf.name for leaf in run), lo + sum(leaf.size for leaf in run)
        first = lo if lo % BLOCK == 0 else min(hi, (lo // BLOCK + 1) * BLOCK)
        last = hi if hi == bucket.size else max(first, hi // BLOCK * BLOCK)
        for start, stop, cut in ((lo, first, True), (first, last, False), (last, hi, True)):
            if start < stop:
                pieces.append(_Piece(stage, start, stop, names, start - lo, cut))
        lo = hi
    return pieces


def _given(piece: _Piece, gradients: Arrays) -> mx.array:
    flat = [gradients[name].reshape(-1) for name in piece.names]
    run = flat[0] if len(flat) == 1 else mx.concatenate(flat)
    own = run[piece.offset : piece.offset + piece.stop - piece.start]
    return own if piece.cut else block_sums([own])


def _put_together(pieces: Sequence[_Piece], values: Mapping[_Piece, mx.array]) -> mx.array:
    sums = []
    for (_, cut), group in groupby(pieces, key=lambda piece: (piece.start // BLOCK, piece.cut)):
        parts = [values[piece] for piece in group]
        sums += [block_sums(parts)] if cut else parts
    return sums[0] if len(sums) == 1 else mx.concatenate(sums)
