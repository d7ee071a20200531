"""`Communicator`: one group of ranks, one generation. And `LocalComm`, the group of one.

What every implementation promises: evaluated arrays in, new arrays out; a call blocks, but never past its deadline; the
only error raised is `CommError`, after which the communicator is dead and every call raises at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_distributed.comm.buckets import Bucket, BucketLayout
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.comm.tree_sum import Node, TreeSum

Parts = Mapping[Node, Bucket]
"""The partial sums that a rank holds of one bucket, by node of the summation tree."""
Pending = Callable[[], list[Bucket]]
"""Called, once, it waits for the sums of an operation that was started, and gives them."""


@dataclass
class Traffic:
    """What a rank's operations have cost so far."""

    reduce_s: float = 0.0
    """Of every all_reduce, or half of one, from its first bucket given to its last one got."""
    sent_bytes: int = 0
    """To all peers, with headers."""


class Communicator(Protocol):
    """One group of ranks, to be derived from. `what` says in words what a call is for, and stands in the error."""

    rank: int
    size: int
    generation: int
    traffic: Traffic

    def all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[Bucket]:
        """The canonical sum of the partial sums that all ranks hold.

        Args:
            layout: of the buckets, the same on every rank.
            num_leaves: leaves of the summation tree. Over all ranks the nodes must cover each leaf exactly once; a
                rank may hold none.
            buckets: this rank's parts of each bucket in the order of `layout`, consumed one by one: a bucket is on its
                way while the iterable works on the next, so give a generator that computes.
            feedback: takes what lossy wire formats leave out, and what they have left out before is sent with these.

        Returns:
            The summed buckets, the same bits on every rank.
        """
        return self.start_all_reduce(layout, num_leaves, buckets, what, feedback)()

    def start_all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> Pending:
        """As `all_reduce`, but return as soon as this rank's parts are handed over, so that it can go on computing.

        No other operation on buckets may begin before the sums have been waited for. Messages may be sent meanwhile;
        a peer that has not begun this operation may come to read them only then.
        """
        ...

    def slices(self, layout: Sequence[BucketLayout]) -> list[list[tuple[int, int]]]:
        """By bucket and rank, the half-open range of the elements of a bucket that a rank owns.

        It begins with a block of `BLOCK` elements, and may be empty.
        """
        ...

    def reduce_scatter(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[mx.array]:
        """Of what `all_reduce` gives, this rank's slice of each bucket, flat."""
        ...

    def all_gather_slices(self, layout: Sequence[BucketLayout], own: Sequence[mx.array], what: str) -> list[Bucket]:
        """Buckets put together from the slices of all ranks.

        Args:
            layout: of the buckets, the same on every rank.
            own: this rank's slice of each bucket, flat.
            what: it is for.
        """
        ...

    def all_gather(self, array: mx.array, what: str) -> list[mx.array]:
        """The arrays of all ranks, in rank order; shapes may differ."""
        ...

    def broadcast(self, array: mx.array | None, root: int, what: str) -> mx.array:
        """The array of rank `root`; what the others give is not looked at."""
        ...

    def send(self, array: mx.array, peer: int, tag: int, what: str) -> None:
        """Hand an array over to the transport for `peer`; returns before it arrives."""
        ...

    def recv(self, peer: int, tag: int, what: str) -> mx.array:
        """The next array that `peer` sent with this tag."""
        ...

    def barrier(self, what: str) -> None:
        """Return when every rank has called this."""
        ...

    def check(self, what: str) -> None:
        """Raise at once where the group is dead, and never block: for use between long computations."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Finish what is owed to the peers, then leave the group. With `error`, tell them why instead."""
        ...


def add_buckets(left: Bucket, right: Bucket) -> Bucket:
    """Elementwise sum, as `TreeSum` wants it."""
    return [a + b for a, b in zip(left, right, strict=True)]


def finish_tree(parts: Parts, num_leaves: int) -> Bucket:
    """The total of parts that cover every leaf."""
    tree: TreeSum[Bucket] = TreeSum(num_leaves, add_buckets)
    for node, bucket in parts.items():
        tree.put(node, bucket)
    return tree.total


class LocalComm(Communicator):
    """The group of one: the tree is finished in place, and no byte moves."""

    rank = 0
    size = 1
    generation = 0

    def __init__(self) -> None:
        self.traffic = Traffic()

    def start_all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> Pending:
        summed = [finish_tree(parts, num_leaves) for parts in buckets]
        return lambda: summed

    def slices(self, layout: Sequence[BucketLayout]) -> list[list[tuple[int, int]]]:
        return [[(0, bucket.size)] for bucket in layout]

    def reduce_scatter(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[mx.array]:
        summed = self.all_reduce(layout, num_leaves, buckets, what, feedback)
        return [mx.concatenate([array.reshape(-1) for array in bucket]) for bucket in summed]

    def all_gather_slices(self, layout: Sequence[BucketLayout], own: Sequence[mx.array], what: str) -> list[Bucket]:
        return [bucket.split(flat) for bucket, flat in zip(layout, own, strict=True)]

    def all_gather(self, array: mx.array, what: str) -> list[mx.array]:
        return [array]

    def broadcast(self, array: mx.array | None, root: int, what: str) -> mx.array:
        assert array is not None
        assert root == 0
        return array

    def send(self, array: mx.array, peer: int, tag: int, what: str) -> None:
        raise AssertionError("a group of one has nobody to send to")

    def recv(self, peer: int, tag: int, what: str) -> mx.array:
        raise AssertionError("a group of one has nobody to receive from")

    def barrier(self, what: str) -> None:
        pass

    def check(self, what: str) -> None:
        pass

    def close(self, error: BaseException | None = None) -> None:
        pass
