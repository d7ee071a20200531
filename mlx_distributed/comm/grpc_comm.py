"""`GrpcComm`: a group of ranks over gRPC, in host memory.

One asyncio loop in one thread carries everything; a second loop in a process would share its poller and slow both.
There is one long-lived stream per pair of ranks, dialled by the lower one; its first message each way is a protobuf
`Hello`, all others are raw frames (`wire`). The thread that calls blocks while the loop works, and only that thread
touches MLX: the loop sees bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
import mlx.core as mx
import numpy as np
from google.protobuf.message import DecodeError

from mlx_distributed import __version__
from mlx_distributed.comm._pb import collective_pb2 as pb
from mlx_distributed.comm.base import Parts, Traffic
from mlx_distributed.comm.buckets import NUMPY_DTYPES, Bucket, BucketLayout
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.comm.reduction import BucketKind, Operation, Reduction, ownership, slices
from mlx_distributed.comm.session import LINGER_S, Link, Session
from mlx_distributed.comm.tree_sum import Node
from mlx_distributed.comm.wire import (
    MAX_MESSAGE_BYTES,
    Frame,
    FrameError,
    Kind,
    array_from_chunks,
    array_to_chunks,
    group_tag,
)
from mlx_distributed.errors import CommError

PROTOCOL_VERSION = 1
SERVICE, METHOD = "mlx_distributed.v1.Collective", "Exchange"

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Large frames and reads: half the processor time per byte of the defaults (measured).
    ("grpc.http2.max_frame_size", 16777215),
    ("grpc.experimental.tcp_read_chunk_size", 4 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 4 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 8 << 20),
    ("grpc.enable_retries", 0),
    # On by default, it lets a second server bind a port that is in use.
    ("grpc.so_reuseport", 0),
    # Gradients do not go through a web proxy.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

HELLO_S = 10.0
"""A connection that has not said who it is by then is closed."""
MAX_STRANGERS = 16
"""Connections that may be about to say so, besides those of the group."""

_INTERNAL_TAG = 1 << 31
"""Tags from here on belong to `all_gather` and `broadcast`."""

_RPC_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)

T = TypeVar("T")


class GrpcComm:
    """A group over gRPC; see `base.Communicator` for the calls.

    Args:
        rank: of this worker in the group.
        size: of the group.
        run_id: secret of the run; a connection that does not know it is refused.
        generation: of the group; frames of another one are refused.
        timeout_s: a peer that is waited for and sends nothing for so long is given up.
        listen: address to listen on; port 0 takes a free one.
        bandwidths: of each rank's link, in any unit, the same on every rank; None means that they are alike.

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
    ) -> None:
        self.rank, self.size, self.generation = rank, size, generation
        self.traffic = Traffic()
        self._shares = ownership(bandwidths or [1.0] * size)
        self._run_id = run_id
        self._session = Session(rank, generation, group_tag(run_id, generation), timeout_s)
        self._dialling: list[asyncio.Task[None]] = []
        self._num_reductions = self._num_messages = 0
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"grpc-comm-{rank}", daemon=True)
        self._thread.start()
        try:
            self.address = self._run(self._listen(listen))
        except CommError:
            self._stop_thread()
            raise

    def connect(self, addresses: Sequence[str]) -> None:
        """Join the group: dial the higher ranks, wait for the lower ones.

        Args:
            addresses: of all ranks, in rank order.
        """
        self._run(self._connect(addresses))

    def all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[Bucket]:
        flats = self._operate(Operation.ALL_REDUCE, layout, num_leaves, _packed(layout, buckets), what, feedback)
        return [bucket.split(flat) for bucket, flat in zip(layout, flats, strict=True)]

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
        return self._operate(Operation.REDUCE_SCATTER, layout, num_leaves, _packed(layout, buckets), what, feedback)

    def all_gather_slices(self, layout: Sequence[BucketLayout], own: Sequence[mx.array], what: str) -> list[Bucket]:
        parts = ({(0, 1): np.asarray(flat)} for flat in own)
        flats = self._operate(Operation.ALL_GATHER, layout, 1, parts, what)
        return [bucket.split(flat) for bucket, flat in zip(layout, flats, strict=True)]

    def all_gather(self, array: mx.array, what: str) -> list[mx.array]:
        name, tag = f"all_gather of {what}", self._internal_tag()
        for peer in self._peers():
            self._send(array, peer, tag, name)
        return [array if peer == self.rank else self._recv(peer, tag, name) for peer in range(self.size)]

    def broadcast(self, array: mx.array | None, root: int, what: str) -> mx.array:
        name, tag = f"broadcast of {what}", self._internal_tag()
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
        self._run(self._close())
        self._stop_thread()

    def _operate(
        self,
        operation: Operation,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Mapping[Node, np.ndarray]],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[mx.array]:
        """Of every bucket what this rank gets, flat: all of it, or its slice of a reduce_scatter."""
        name, begun_s = f"{operation.value} of {what}", time.monotonic()
        self._check(name, begun_s)
        self._num_reductions += 1
        kinds = [BucketKind(bucket.size, np.dtype(NUMPY_DTYPES[bucket.dtype]), bucket.wire) for bucket in layout]
        reduction = Reduction(self._num_reductions, self.rank, self._shares, kinds, num_leaves, operation, feedback)
        self._call(self._session.begin, reduction)
        given_s, flats = math.inf, []
        for index, parts in enumerate(buckets):
            given_s = min(given_s, time.monotonic())
            self._check(name, begun_s)
            flat, result = layout[index].empty(reduction.result_size(index))
            flats.append(flat)
            self._call(self._session.contribute, reduction, index, parts, result)
            del parts
        self._call(self._session.end, reduction)
        self._run(self._session.wait(name, lambda: reduction.done, reduction.waiting_for, begun_s))
        self.traffic.reduce_s += max(time.monotonic() - given_s, 0.0)
        self.traffic.sent_bytes = self._session.sent_bytes
        return flats

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

    def _call(self, function: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Everything below runs in the loop's thread.

    async def _listen(self, address: str) -> str:
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=self.size + MAX_STRANGERS)
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: method}),))
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            reason = f"cannot listen on {address}; is the port in use? Choose another, or 0 for a free one"
            raise CommError("listen", None, self.generation, 0.0, reason) from None
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def _connect(self, addresses: Sequence[str]) -> None:
        self._dialling = [
            asyncio.create_task(self._dial(peer, addresses[peer])) for peer in range(self.rank + 1, self.size)
        ]
        peers, links = set(self._peers()), self._session.links
        begun_s = time.monotonic()
        await self._session.wait("connect", lambda: peers <= links.keys(), lambda: peers - links.keys(), begun_s)

    async def _close(self) -> None:
        await self._session.close()
        # After a failure the session has lingered already, and whoever waits for the end has waited long enough.
        grace_s = LINGER_S if self._session.failure is None else 0.0
        if self._dialling:
            await asyncio.wait(self._dialling, timeout=grace_s)
        for task in self._dialling:
            task.cancel()
        await asyncio.gather(*self._dialling, return_exceptions=True)
        await self._server.stop(grace=grace_s)

    def _hello(self) -> pb.Hello:
        return pb.Hello(
            run_id=self._run_id,
            generation=self.generation,
            rank=self.rank,
            size=self.size,
            protocol_version=PROTOCOL_VERSION,
            program_version=__version__,
        )

    def _refusal(self, hello: pb.Hello, ranks: Collection[int]) -> str | None:
        """Why a peer is not taken, in words that give nothing of this run away.

        Args:
            ranks: any of which it may be.
        """
        mine = self._hello()
        if not hmac.compare_digest(hello.run_id.encode(), mine.run_id.encode()):
            return "this is another run"
        for field in ("protocol_version", "program_version", "generation", "size"):
            theirs, ours = getattr(hello, field), getattr(mine, field)
            if theirs != ours:
                return f"{field} is {theirs} there and {ours} here"
        if hello.rank not in ranks or hello.rank in self._session.links:
            return f"rank {hello.rank} is not expected"
        return None

    async def _serve(self, _: object, context: grpc.aio.ServicerContext) -> None:
        try:
            hello = pb.Hello.FromString(await asyncio.wait_for(_bytes(context.read), HELLO_S))
        except (ConnectionError, DecodeError, TimeoutError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a Hello")
        refusal = self._refusal(hello, range(self.rank))
        if refusal:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        await context.write(self._hello().SerializeToString())
        await self._session.carry(hello.rank, _link(context.read, context.write))

    async def _dial(self, peer: int, address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(wait_for_ready=True)
            try:
                await call.write(self._hello().SerializeToString())
                answer = pb.Hello.FromString(await _bytes(call.read))
            except (ConnectionError, DecodeError, *_RPC_ERRORS):
                self._session.fail(peer, f"refused the connection: {await call.details()}")
                return
            refusal = self._refusal(answer, (peer,))
            if refusal:
                self._session.fail(peer, f"answers at {address} as somebody else: {refusal}")
                return
            await self._session.carry(peer, _link(call.read, call.write))
            # The stream is torn down only when the peer has read our last frame and ended its side.
            await call.done_writing()
            await call.read()


def _packed(layout: Sequence[BucketLayout], buckets: Iterable[Parts]) -> Iterator[dict[Node, np.ndarray]]:
    for bucket, parts in zip(layout, buckets, strict=True):
        yield {node: bucket.pack(arrays) for node, arrays in parts.items()}


async def _bytes(read: Callable[[], Awaitable[Any]]) -> bytes:
    """The next message; `ConnectionError` at the end of the stream, whatever ended it."""
    try:
        data = await read()
    except grpc.aio.AioRpcError as error:
        raise ConnectionError(error.details() or error.code().name) from None
    except _RPC_ERRORS as error:
        raise ConnectionError(str(error)) from None
    if data is grpc.aio.EOF:
        raise ConnectionError("the stream ended")
    return bytes(data)


def _link(read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]]) -> Link:
    async def checked_write(data: bytes) -> None:
        try:
            await write(data)
        except _RPC_ERRORS as error:
            raise ConnectionError(str(error)) from None

    return Link(lambda: _bytes(read), checked_write)
