"""One all_reduce as one rank sees it: frames in, frames out, and no transport.

Every rank owns one slice of every bucket. A rank sends each of its partial sums to the owners, slice by slice (PART);
an owner adds what comes along the canonical tree (`TreeSum`) and sends the finished slice to all (RESULT). As many
bytes travel as in a ring, in two hops on any number of ranks, and the order of addition does not depend on who holds
what.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_distributed.comm.tree_sum import Node, TreeSum
from mlx_distributed.comm.wire import CHUNK_BYTES, Frame, FrameError, Kind

SMALL_BYTES = 64 << 10
"""A bucket up to this size has one owner: latency counts there, and a slice each would multiply the messages."""

Outgoing = tuple[int, Frame]
"""Receiving rank and frame."""


def slices(bucket: int, num_elements: int, itemsize: int, size: int) -> list[tuple[int, int]]:
    """The half-open range of a bucket's elements that each rank owns."""
    if num_elements * itemsize <= SMALL_BYTES:
        owner = bucket % size
        return [(0, num_elements) if rank == owner else (0, 0) for rank in range(size)]
    edges = [num_elements * rank // size for rank in range(size + 1)]
    return list(itertools.pairwise(edges))


def chunks(start: int, stop: int, itemsize: int) -> list[tuple[int, int]]:
    """A slice cut into ranges of at most `CHUNK_BYTES`."""
    length = CHUNK_BYTES // itemsize
    return [(at, min(at + length, stop)) for at in range(start, stop, length)]


@dataclass
class _BucketState:
    """What this rank holds of one bucket."""

    dtype: np.dtype
    chunks: list[list[tuple[int, int]]]
    """By owning rank, the ranges of its chunks."""
    trees: list[TreeSum[np.ndarray]]
    """By chunk of the slice that this rank owns."""
    num_elements: int
    result: np.ndarray | None = None
    """Made when its first chunk comes, gone when it is taken."""
    missing: list[set[int]] = field(default_factory=list)
    """By owning rank, the chunks of the result that are not here yet."""

    def __post_init__(self) -> None:
        self.missing = [set(range(len(ranges))) for ranges in self.chunks]


class Reduction:
    """The bookkeeping of one operation. Used by one thread only.

    Args:
        op: number of the operation in its group.
        rank: of this worker.
        size: of the group.
        buckets: elements and numpy dtype of each bucket.
        num_leaves: of the summation tree.
    """

    def __init__(self, op: int, rank: int, size: int, buckets: Sequence[tuple[int, np.dtype]], num_leaves: int) -> None:
        self.op, self._rank, self._size = op, rank, size
        self._not_ended = set(range(size))
        self._buckets: list[_BucketState] = []
        for index, (num_elements, dtype) in enumerate(buckets):
            owned = slices(index, num_elements, dtype.itemsize, size)
            ranges = [chunks(start, stop, dtype.itemsize) for start, stop in owned]
            trees = [TreeSum[np.ndarray](num_leaves) for _ in ranges[rank]]
            self._buckets.append(_BucketState(dtype, ranges, trees, num_elements))

    def contribute(self, index: int, parts: Mapping[Node, np.ndarray]) -> Iterator[Outgoing]:
        """Put in this rank's partial sums of one bucket: flat buffers, which must not be changed afterwards."""
        state = self._buckets[index]
        for node, flat in parts.items():
            for peer, ranges in enumerate(state.chunks):
                for chunk, (start, stop) in enumerate(ranges):
                    if peer == self._rank:
                        yield from self._add(index, chunk, node, flat[start:stop])
                    else:
                        payload = flat[start:stop].data.cast("B")
                        yield peer, Frame(Kind.PART, self.op, index, chunk, *node, payload)

    def end(self) -> Iterator[Outgoing]:
        """All parts of this rank have been put in."""
        self._end(self._rank)
        for peer in range(self._size):
            if peer != self._rank:
                yield peer, Frame(Kind.END, self.op)

    def receive(self, peer: int, frame: Frame) -> Iterator[Outgoing]:
        """Take in a frame of this operation.

        Raises:
            FrameError: the frame does not fit the operation; the sum is not touched.
        """
        if frame.kind is Kind.END:
            self._end(peer)
            return
        if frame.bucket >= len(self._buckets):
            raise FrameError(f"sent bucket {frame.bucket} of {len(self._buckets)}")
        state = self._buckets[frame.bucket]
        owner = self._rank if frame.kind is Kind.PART else peer
        if frame.chunk >= len(state.chunks[owner]):
            raise FrameError(f"sent chunk {frame.chunk} of {len(state.chunks[owner])} of bucket {frame.bucket}")
        start, stop = state.chunks[owner][frame.chunk]
        if len(frame.payload) != (stop - start) * state.dtype.itemsize:
            raise FrameError(f"sent {len(frame.payload)} bytes for {stop - start} elements of {state.dtype}")
        values = np.frombuffer(frame.payload, state.dtype)
        if frame.kind is Kind.PART:
            if peer not in self._not_ended:
                raise FrameError("sent a part after its last one")
            yield from self._add(frame.bucket, frame.chunk, (frame.lo, frame.hi), values)
        else:
            if frame.chunk not in state.missing[peer]:
                raise FrameError(f"sent chunk {frame.chunk} of the result of bucket {frame.bucket} twice")
            self._finish_chunk(frame.bucket, peer, frame.chunk, values)

    def waiting_for(self) -> set[int]:
        """The ranks whose frames are missing: first those that have not sent their parts, then owners of results."""
        if self._not_ended:
            return self._not_ended - {self._rank}
        return {peer for state in self._buckets for peer in range(self._size) if state.missing[peer]} - {self._rank}

    @property
    def done(self) -> bool:
        """Whether every bucket of the result is here and every rank has ended."""
        return not self._not_ended and not any(any(state.missing) for state in self._buckets)

    def take(self, index: int) -> np.ndarray:
        """The sum of one bucket, flat. It can be taken once, when `done`, so that host memory is free again."""
        state = self._buckets[index]
        result, state.result = state.result, None
        return np.empty(0, state.dtype) if result is None else result

    def _add(self, index: int, chunk: int, node: Node, values: np.ndarray) -> Iterator[Outgoing]:
        state = self._buckets[index]
        tree = state.trees[chunk]
        if tree.complete:
            raise FrameError(f"sent leaves {node[0]} to {node[1] - 1} of bucket {index}, which is complete")
        try:
            tree.put(node, values)
        except ValueError as error:
            raise FrameError(f"sent a part that does not fit: {error}") from None
        if tree.complete:
            total = tree.total
            self._finish_chunk(index, self._rank, chunk, total)
            payload = total.data.cast("B")
            for peer in range(self._size):
                if peer != self._rank:
                    yield peer, Frame(Kind.RESULT, self.op, index, chunk, payload=payload)
            # Only that it is complete matters from here on; the values would stay until the operation ends.
            tree.parts[(0, tree.num_leaves)] = np.empty(0, state.dtype)

    def _finish_chunk(self, index: int, owner: int, chunk: int, values: np.ndarray) -> None:
        state = self._buckets[index]
        start, stop = state.chunks[owner][chunk]
        if state.result is None:
            state.result = np.empty(state.num_elements, state.dtype)
        state.result[start:stop] = values
        state.missing[owner].remove(chunk)

    def _end(self, peer: int) -> None:
        if peer not in self._not_ended:
            raise FrameError("ended the operation twice")
        self._not_ended.remove(peer)
        if not self._not_ended and any(state.missing[self._rank] for state in self._buckets):
            raise FrameError("was the last to end, and some leaves of the sum are missing")
