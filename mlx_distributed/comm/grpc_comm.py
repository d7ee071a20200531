"""`GrpcComm`: a group of ranks over gRPC, in host memory.

The thread that calls blocks while the loop of the `Endpoint` works, and only that thread touches MLX: the loop sees
bytes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator, Parts, Pending, Traffic
from mlx_distributed.comm.buckets import NUMPY_DTYPES, Bucket, BucketLayout
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.grpc_streams import Streams
from mlx_distributed.comm.hello import Membership
from mlx_distributed.comm.link_speed import UNKNOWN, LinkSpeed
from mlx_distributed.comm.malloc import keep_freed_memory
from mlx_distributed.comm.probe import probe
from mlx_distributed.comm.reduction import BucketKind, Operation, Reduction, fineness, ownership, slices
from mlx_distributed.comm.session import Session
from mlx_distributed.comm.tree_sum import Node
from mlx_distributed.comm.wire import (
    Frame,
    FrameError,
    Kind,
    array_from_chunks,
    array_to_chunks,
    group_tag,
)
from mlx_distributed.errors import CommError

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity  # imports a library that a group without TLS need not wait for

_INTERNAL_TAG = 1 << 31
"""Tags from here on belong to `all_gather` and `broadcast`."""


class GrpcComm(Communicator):
    """A group over gRPC; see `base.Communicator` for the calls. `interrupt` and `silent` are for any thread.

    Args:
        rank: of this worker in the group.
        size: of the group.
        run_id: secret of the run; a connection that does not know it is refused.
        generation: of the group, below 2 ** 63; frames of another one are refused.
        timeout_s: a peer that is waited for and sends nothing for so long is given up.
        listen: address to listen on; port 0 takes a free one.
        bandwidths: of each rank's link, in any unit, the same on every rank; None means that they are alike.
        identity: of the run, for mutual TLS; None means that nothing is encrypted. TLS takes 1.6 times the processor
            time (fp32, measured), so ranks on one machine go without: the secret of the run is checked either way.
        endpoint: that the group is reached at, in place of `listen` and `identity`, and that outlives it: the next
            group there has a higher generation, and may begin as soon as this one is closed.

    Raises:
        CommError: the address cannot be listened on.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        run_id: str,
        generation: int = 0,
        timeout_s: float = 300.0,
        listen: str = "127.0.0.1:0",
        bandwidths: Sequence[float] | None = None,
        identity: Identity | None = None,
        endpoint: Endpoint | None = None,
    ) -> None:
        keep_freed_memory()
        self.rank, self.size, self.generation = rank, size, generation
        self.traffic = Traffic()
        self.share_by(bandwidths or [1.0] * size)
        self._session = Session(rank, generation, group_tag(run_id, generation), timeout_s)
        self._num_reductions = self._num_messages = 0
        self._closed = False
        self._own_endpoint = endpoint is None
        self._endpoint = endpoint or Endpoint(listen, identity)
        self._call, self._run = self._endpoint.call, self._endpoint.run
        self._streams = Streams(Membership(run_id, generation, rank, size), self._session, self._endpoint.identity)
        self._call(self._endpoint.serve, self._streams, self._own_endpoint)

    @property
    def address(self) -> str:
        """Where the group is reached at this rank."""
        return self._endpoint.address

    def connect(self, addresses: Sequence[str]) -> None:
        """Join the group: dial the higher ranks, wait for the lower ones.

        Args:
            addresses: of all ranks, in rank order.
        """
        self._run(self._streams.connect(addresses))

    def share_by(self, bandwidths: Sequence[float]) -> None:
        """Share the slices of buckets in another way from the next operation on; called by all ranks, before any of
        them begins it.

        Args:
            bandwidths: of each rank's link, in any unit, the same on every rank.
        """
        self._shares, self._fineness = ownership(bandwidths), fineness(bandwidths)

    def measure_links(self, centres: Collection[int]) -> list[LinkSpeed]:
        """Measure the links of some ranks, one after the other; called by all ranks of a group of two or more.

        Args:
            centres: the ranks whose links are measured, the same on every rank.

        Returns:
            By rank, the same on every rank; `UNKNOWN` for those that were not measured.
        """
        own, name = UNKNOWN, "the measurement of links"
        self._check(name, time.monotonic())
        for centre in sorted(centres):
            own = self._run(probe(self._session, self.size, centre, self._internal_tag())) or own
        return [LinkSpeed(*np.asarray(array).tolist()) for array in self.all_gather(mx.array(own), name)]

    def start_all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> Pending:
        wait = self._start(Operation.ALL_REDUCE, layout, num_leaves, _packed(layout, buckets), what, feedback)
        return lambda: [bucket.split(flat) for bucket, flat in zip(layout, wait(), strict=True)]

    def slices(self, layout: Sequence[BucketLayout]) -> list[list[tuple[int, int]]]:
        return [slices(bucket.size, self._shares, index) for index, bucket in enumerate(layout)]

    def reduce_scatter(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[mx.array]:
        return self._start(Operation.REDUCE_SCATTER, layout, num_leaves, _packed(layout, buckets), what, feedback)()

    def all_gather_slices(self, layout: Sequence[BucketLayout], own: Sequence[mx.array], what: str) -> list[Bucket]:
        parts = ({(0, 1): np.asarray(flat)} for flat in own)
        flats = self._start(Operation.ALL_GATHER, layout, 1, parts, what)()
        return [bucket.split(flat) for bucket, flat in zip(layout, flats, strict=True)]

    def all_gather(self, array: mx.array, what: str) -> list[mx.array]:
        name, tag = f"all_gather of {what}", self._internal_tag()
        self._check(name, time.monotonic())
        for peer in self._peers():
            self._send(array, peer, tag, name)
        return [array if peer == self.rank else self._recv(peer, tag, name) for peer in range(self.size)]

    def broadcast(self, array: mx.array | None, root: int, what: str) -> mx.array:
        name, tag = f"broadcast of {what}", self._internal_tag()
        self._check(name, time.monotonic())
        if self.rank != root:
            return self._recv(root, tag, name)
        assert array is not None
        for peer in self._peers():
            self._send(array, peer, tag, name)
        return array

    def send(self, array: mx.array, peer: int, tag: int, what: str) -> None:
        assert 0 <= tag < _INTERNAL_TAG
        self._send(array, peer, tag, f"send of {what}")

    def recv(self, peer: int, tag: int, what: str) -> mx.array:
        assert 0 <= tag < _INTERNAL_TAG
        return self._recv(peer, tag, f"recv of {what}")

    def barrier(self, what: str) -> None:
        self.all_gather(mx.zeros(0), what)

    def check(self, what: str) -> None:
        self._check(what, time.monotonic())

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group. With `error` the peers are told why, so that their errors name this rank and the reason."""
        if self._closed:
            return
        self._closed = True
        if error is not None:
            self._call(self._session.fail, self.rank, " ".join(str(error).split()) or type(error).__name__)
        with contextlib.suppress(CommError):  # Where the endpoint is closed, the group is.
            self._run(self._session.close())
        leaving = self._endpoint.start(self._endpoint.leave(self._streams))
        if self._own_endpoint:
            leaving.result()
            self._endpoint.close()

    def interrupt(self, reason: str) -> None:
        """End the call under way, and every later one, with a `CommError` that says so; the peers are told."""
        self._call(self._session.fail, None, reason)

    def silent(self, for_s: float) -> list[int]:
        """The ranks that the operation under way waits for, and that nothing has gone to or come from for so long."""

        async def ask() -> list[int]:
            return self._session.silent(for_s)

        try:
            return self._run(ask())
        except CommError:
            return []  # Closed meanwhile.

    def _start(
        self,
        operation: Operation,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Mapping[Node, np.ndarray]],
        what: str,
        feedback: Feedback | None = None,
    ) -> Callable[[], list[mx.array]]:
        """Hand over this rank's parts. What is returned waits for the sums, and gives of every bucket what this rank
        gets, flat: all of it, or its slice of a reduce_scatter."""
        name, begun_s = f"{operation.value} of {what}", time.monotonic()
        self._check(name, begun_s)
        self._num_reductions += 1
        kinds = [BucketKind(bucket.size, np.dtype(NUMPY_DTYPES[bucket.dtype]), bucket.wire) for bucket in layout]
        reduction = Reduction(
            self._num_reductions, self.rank, self._shares, kinds, num_leaves, operation, feedback, self._fineness
        )
        self._call(self._session.begin, reduction)
        given_s, flats = math.inf, []
        for index, parts in enumerate(buckets):
            given_s = min(given_s, time.monotonic())
            self._check(name, begun_s)
            flat, result = layout[index].empty(reduction.result_size(index))
            flats.append(flat)
            last = index == len(layout) - 1
            self._call(self._session.contribute, reduction, index, parts, result, last)
            del parts
        if not layout:
            self._call(self._session.end, reduction)

        async def finish() -> float:
            await self._session.wait(name, lambda: reduction.done, reduction.waiting_for, begun_s)
            return time.monotonic()

        finished = self._endpoint.start(finish())

        def wait() -> list[mx.array]:
            self.traffic.reduce_s += max(finished.result() - given_s, 0.0)
            self.traffic.sent_bytes = self._session.sent_bytes
            return flats

        return wait

    def _internal_tag(self) -> int:
        self._num_messages += 1
        return _INTERNAL_TAG + self._num_messages % _INTERNAL_TAG

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _send(self, array: mx.array, peer: int, tag: int, name: str) -> None:
        self._check(name, time.monotonic())
        chunks = array_to_chunks(array)
        frames = [Frame(Kind.MESSAGE, tag, 0, i, 0, len(chunks), chunk) for i, chunk in enumerate(chunks)]
        self._call(self._session.post, [(peer, frame) for frame in frames])

    def _recv(self, peer: int, tag: int, name: str) -> mx.array:
        start_s = time.monotonic()
        self._check(name, start_s)
        chunks = self._run(self._session.take(peer, tag, name))
        try:
            return array_from_chunks(chunks)
        except FrameError as error:
            self._call(self._session.fail, peer, str(error))
            raise CommError(name, peer, self.generation, time.monotonic() - start_s, str(error)) from None

    def _check(self, name: str, begun_s: float) -> None:
        """Raise at once where the communicator is dead."""
        if self._closed:
            raise CommError(name, None, self.generation, 0.0, "the communicator is closed")
        if self._session.failure is not None:
            raise self._session.error(name, begun_s)


def _packed(layout: Sequence[BucketLayout], buckets: Iterable[Parts]) -> Iterator[dict[Node, np.ndarray]]:
    for bucket, parts in zip(layout, buckets, strict=True):
        yield {node: bucket.pack(arrays) for node, arrays in parts.items()}
