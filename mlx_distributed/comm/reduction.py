"""One operation as one rank sees it: frames in, frames out, and no transport.

A large bucket is cut into slices, one owned by each rank. A rank sends each of its partial sums to the owners, slice
by slice (PART); an owner adds what comes along the canonical tree (`TreeSum`) and sends the finished slice to all
(RESULT). As many bytes travel as in a ring, in two hops on any number of ranks, and the order of addition does not
depend on who holds what. Between two ranks, and for a small bucket, every rank sends its parts to all and owns the
whole: one hop.

An all_reduce is all of that. A reduce_scatter ends with the finished slices, each on its owner; an all_gather begins
with them. With an update between the two, ranks exchange what was made of the sums.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_distributed.comm.buckets import BLOCK
from mlx_distributed.comm.compress import Codec, Feedback, Payload, codec_for
from mlx_distributed.comm.tree_sum import Node, TreeSum
from mlx_distributed.comm.wire import Frame, FrameError, Kind

DIRECT_BYTES = 64 << 10
"""Up to this size a bucket takes one hop: latency counts there, and not bytes."""


AHEAD = 1
"""By so many buckets what a rank puts in may be ahead of the sums that it has, so that others need not keep more that
cannot be added yet, however late one of them is."""


class Operation(enum.Enum):
    """What ranks do with slices."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"


Outgoing = tuple[int, Frame]
"""Receiving rank and frame."""


def ownership(bandwidths: Sequence[float]) -> list[float]:
    """The share of every large bucket that each of several ranks owns, so that all links are busy equally long.

    Of a bucket of S bytes rank i sends, and receives, S (1 + (n - 2) s_i): the slices of the others to their owners,
    and its own result to each of them. The time of the slowest is least when S (1 + (n - 2) s_i) / b_i is the same for
    all; a link so slow that even owning nothing takes longer owns nothing.

    Args:
        bandwidths: of each rank's link, in any unit.

    Source:
        the linear programme of Ryabinin et al. 2021, "Moshpit SGD" and "hivemind", solved for this exchange.
    """
    size = len(bandwidths)
    if size <= 2:
        return [1 / size] * size
    time = max((2 * size - 2) / sum(bandwidths), 1 / min(bandwidths))
    spare = [max(time * bandwidth - 1, 0.0) for bandwidth in bandwidths]
    return [share / sum(spare) for share in spare]


def fineness(bandwidths: Sequence[float]) -> float:
    """The size of chunks, as a share of what a codec would have them be, for which a chunk takes the slowest link as
    long as a whole one takes the fastest.

    What the slow rank gets lags behind what it sends by a chunk to every owner, and its link is busy both ways all the
    time: over 1000/1000/200 Mbit/s whole chunks of 16 MB took 1.25 of the optimum, these 1.10 to 1.19, as bare sockets
    do. Chunks below an eighth cost more than they gain.
    """
    return max(min(bandwidths) / max(bandwidths), 1 / 8)


def slices(num_elements: int, shares: Sequence[float], index: int) -> list[tuple[int, int]]:
    """The half-open range of the elements of bucket `index` that each rank owns: whole blocks of `BLOCK`, in proportion
    to the shares, and rounded differently from bucket to bucket, so that nobody gets less of all of them."""
    num_blocks, size = -(-num_elements // BLOCK), len(shares)
    rounding = (index % size + 0.5) / size
    edges = [int(num_blocks * share + rounding) for share in itertools.accumulate(shares, initial=0.0)]
    return list(itertools.pairwise([*(min(edge * BLOCK, num_elements) for edge in edges[:-1]), num_elements]))


def chunks(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """A range cut into ranges of at most `length`."""
    return [(at, min(at + length, stop)) for at in range(start, stop, length)]


@dataclass
class _BucketState:
    """What this rank holds of one bucket."""

    dtype: np.dtype
    codec: Codec
    direct: bool
    """Every rank owns the whole."""
    given_at: int
    """The element at which the flat buffers of parts begin."""
    result_range: tuple[int, int]
    """What this rank gets."""
    chunks: list[list[tuple[int, int]]]
    """By owning rank, the ranges of its chunks."""
    trees: list[TreeSum[np.ndarray]]
    """By chunk that this rank owns."""
    missing: list[set[int]]
    """By owning rank, the chunks of the result that are not here yet."""
    owed: tuple[np.ndarray | None, np.ndarray] | None
    """Of a codec that is not exact: what was left out before, and what is being left out now."""
    result: np.ndarray | None = None
    """Where the sum is written; given with this rank's parts."""
    early: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    """Owner, chunk and values of what was finished before that."""

    def encode(self, start: int, stop: int, values: np.ndarray, first: bool) -> tuple[Payload, np.ndarray]:
        """Values of a range as they travel, and what they decode to. What was left out before goes with the first."""
        if self.codec.exact:
            return self.codec.encode(values), values
        before, after = self.owed or (None, None)
        if first and before is not None:
            values = values + before[start:stop]
        payload = self.codec.encode(values)
        decoded = self.codec.decode(payload, stop - start)
        if after is not None:
            if first:
                np.subtract(values, decoded, out=after[start:stop])
            else:
                after[start:stop] += values - decoded
        return payload, decoded

    def write(self, owner: int, chunk: int, values: np.ndarray) -> None:
        """Put a finished chunk into the result, as soon as there is one."""
        if self.result is None:
            self.early.append((owner, chunk, values))
            return
        start, stop = self.chunks[owner][chunk]
        at = self.result_range[0]
        self.result[start - at : stop - at] = values

    def settle(self, start: int, stop: int, values: np.ndarray) -> np.ndarray:
        """Values of a range that do not travel, so that nothing is left out: with them what was left out before."""
        before, after = self.owed or (None, None)
        if before is None or after is None:
            return values
        after[start:stop] = 0
        return values + before[start:stop]


@dataclass(frozen=True)
class BucketKind:
    """What all ranks must agree on about a bucket."""

    num_elements: int
    dtype: np.dtype
    wire: str = "fp32"


class Reduction:
    """The bookkeeping of one operation. Used by one thread only.

    Args:
        op: number of the operation in its group.
        rank: of this worker.
        shares: of every rank in the ownership of a large bucket, adding up to 1.
        buckets: of the operation.
        num_leaves: of the summation tree.
        operation: what is done. What a rank gives to an all_gather is its slice, as the only leaf of the tree, and what
            it gets from a reduce_scatter is its slice.
        feedback: takes what lossy wire formats leave out; None lets it go.
        fineness: of the chunks, the same on every rank.
    """

    def __init__(
        self,
        op: int,
        rank: int,
        shares: Sequence[float],
        buckets: Sequence[BucketKind],
        num_leaves: int,
        operation: Operation = Operation.ALL_REDUCE,
        feedback: Feedback | None = None,
        fineness: float = 1.0,
    ) -> None:
        self._operation = operation
        self.op, self._rank, self._size = op, rank, len(shares)
        # From the next rank on: if all began with the same one, they would wait for each other at its door.
        self._peers = [(rank + offset) % self._size for offset in range(1, self._size)]
        self._not_ended = set(range(self._size))
        self._reached = [-1] * self._size
        """By rank, the last bucket of which it has put in something, as far as is known."""
        self._oldest = 0
        """All buckets before this one are complete."""
        self._buckets: list[_BucketState] = []
        for index, bucket in enumerate(buckets):
            codec = codec_for(bucket.wire, bucket.dtype)
            num_bytes = bucket.num_elements * bucket.dtype.itemsize
            # Of two ranks, one with k partial sums of a bucket sends k times its bytes, in two hops (k + 1) / 2 times.
            # That is as much where the range of a rank is aligned with the tree (k = 1). Where it is not, bytes are
            # given for a hop, and for rounding once and not twice in a lossy format: ranks would have to agree on what
            # each of them gives to every bucket before they begin.
            direct = operation is Operation.ALL_REDUCE and (self._size <= 2 or num_bytes <= DIRECT_BYTES)
            whole = (0, bucket.num_elements)
            owned = [whole] * self._size if direct else slices(bucket.num_elements, shares, index)
            given_at = owned[rank][0] if operation is Operation.ALL_GATHER else 0
            result_range = owned[rank] if operation is Operation.REDUCE_SCATTER else whole
            alone = direct or operation is Operation.REDUCE_SCATTER
            length = int(codec.chunk_bytes * fineness) // bucket.dtype.itemsize
            ranges = [chunks(*slice_, length) for slice_ in owned]
            missing = [set(range(len(r))) if i == rank or not alone else set() for i, r in enumerate(ranges)]
            trees = [TreeSum[np.ndarray](num_leaves, _added) for _ in ranges[rank]]
            owed = None if codec.exact or feedback is None else feedback.begin(index, bucket.num_elements)
            self._buckets.append(
                _BucketState(bucket.dtype, codec, direct, given_at, result_range, ranges, trees, missing, owed)
            )

    def result_size(self, index: int) -> int:
        """Elements of what this rank gets of one bucket."""
        start, stop = self._buckets[index].result_range
        return stop - start

    def contribute(self, index: int, parts: Mapping[Node, np.ndarray], result: np.ndarray) -> Iterator[Outgoing]:
        """Put in this rank's partial sums of one bucket: flat buffers, which must not be changed afterwards. The sum
        of all ranks is written into `result`, and is whole when `done`."""
        self._reached[self._rank] = index
        state = self._buckets[index]
        state.result = result
        while state.early:
            state.write(*state.early.pop())
        for number, (node, flat) in enumerate(parts.items()):
            for owner in [*self._peers, self._rank]:
                if owner != self._rank and (state.direct or self._operation is Operation.ALL_GATHER):
                    continue
                to = self._peers if state.direct else [owner] if owner != self._rank else []
                for chunk, (start, stop) in enumerate(state.chunks[owner]):
                    values = flat[start - state.given_at : stop - state.given_at]
                    if to:
                        payload, values = state.encode(start, stop, values, first=number == 0)
                        part = Frame(Kind.PART, self.op, index, chunk, *node, payload)
                        yield from ((peer, part) for peer in to)
                    if owner == self._rank:
                        yield from self._add(index, chunk, node, values)

    def has_room(self, index: int) -> bool:
        """Whether parts of a bucket may be put in: the buckets long before it are complete."""
        while self._oldest < len(self._buckets) and not any(self._buckets[self._oldest].missing):
            self._oldest += 1
        return index <= self._oldest + AHEAD

    def is_due(self, frame: Frame) -> bool:
        """Whether a frame may be received already: nobody waits for the parts of a rank that holds none, and others may
        be further ahead of it."""
        ahead = frame.kind is not Kind.END and frame.bucket < len(self._buckets)
        return not ahead or frame.bucket <= self._reached[self._rank] + AHEAD + 1

    def end(self) -> Iterator[Outgoing]:
        """All parts of this rank have been put in."""
        yield from ((peer, Frame(Kind.END, self.op)) for peer in self._peers)
        self._end(self._rank)  # Last: whoever is done may leave, and what is not queued by then would not be sent.

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
        if len(frame.payload) != state.codec.num_bytes(stop - start):
            raise FrameError(f"sent {len(frame.payload)} bytes for {stop - start} elements of {state.dtype}")
        values = state.codec.decode(frame.payload, stop - start)
        if frame.kind is Kind.PART:
            if self._operation is Operation.ALL_GATHER:
                raise FrameError("sent a part where there are none")
            if peer not in self._not_ended:
                raise FrameError("sent a part after its last one")
            self._reached[peer] = max(frame.bucket, self._reached[peer])
            yield from self._add(frame.bucket, frame.chunk, (frame.lo, frame.hi), values)
        else:
            if frame.chunk not in state.missing[peer]:
                raise FrameError(f"sent chunk {frame.chunk} of the result of bucket {frame.bucket}, which is not due")
            self._finish_chunk(frame.bucket, peer, frame.chunk, values)

    def waiting_for(self) -> set[int]:
        """The ranks whose frames are missing: first, of those that have not sent all their parts, the furthest behind,
        which may be holding up the others; then owners of results."""
        if late := self._not_ended - {self._rank}:
            last = min(self._reached[peer] for peer in late)
            return {peer for peer in late if self._reached[peer] == last}
        return {peer for state in self._buckets for peer in range(self._size) if state.missing[peer]} - {self._rank}

    @property
    def done(self) -> bool:
        """Whether every bucket of the result is here and every rank has ended."""
        return not self._not_ended and not any(any(state.missing) for state in self._buckets)

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
            if self._operation is Operation.REDUCE_SCATTER:
                total = state.settle(*state.chunks[self._rank][chunk], total)
            elif not state.direct:
                payload, total = state.encode(*state.chunks[self._rank][chunk], total, first=True)
                result = Frame(Kind.RESULT, self.op, index, chunk, payload=payload)
                yield from ((peer, result) for peer in self._peers)
            self._finish_chunk(index, self._rank, chunk, total)
            # Only that it is complete matters from here on; the values would stay until the operation ends.
            tree.parts[(0, tree.num_leaves)] = np.empty(0, state.dtype)

    def _finish_chunk(self, index: int, owner: int, chunk: int, values: np.ndarray) -> None:
        state = self._buckets[index]
        state.missing[owner].remove(chunk)
        state.write(owner, chunk, values)

    def _end(self, peer: int) -> None:
        if peer not in self._not_ended:
            raise FrameError("ended the operation twice")
        self._not_ended.remove(peer)
        if not self._not_ended and any(state.missing[self._rank] for state in self._buckets):
            raise FrameError("was the last to end, and some leaves of the sum are missing")


def _added(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether a sum is finite is for the step to see, and nothing that numpy need warn of."""
    with np.errstate(all="ignore"):
        total: np.ndarray = left + right
    return total
