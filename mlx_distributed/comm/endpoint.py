"""`Endpoint`: where a worker is reached for the life of its process, by the groups of one generation after the other.

One gRPC server and one asyncio loop in one thread carry everything; a second loop in a process would share its poller
and slow both.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mlx_distributed.comm._pb import collective_pb2 as pb
from mlx_distributed.comm.grpc_streams import EXCHANGE, OPTIONS, Streams, read_bytes
from mlx_distributed.comm.session import LINGER_S
from mlx_distributed.errors import CommError

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity  # imports a library that a group without TLS need not wait for

LAST_S = 0.1
"""Calls end within this when the endpoint is closed: the groups have lingered already."""
HELLO_S = 10.0
"""A connection that has not said who it is by then is closed; and one whose group is not known here by then."""
MAX_STRANGERS = 16
"""Connections that may wait so, besides those of the group. A member that comes when there are more tries again."""

Handler = Callable[[bytes, grpc.aio.ServicerContext], AsyncIterator[bytes]]
"""Answers one call: a message in, messages out, of up to `wire.MAX_MESSAGE_BYTES`. It runs in the endpoint's loop,
which it must not block, and finds out for itself whether the caller may know."""

T = TypeVar("T")


class Endpoint:
    """Listens on an address until it is closed. Generations of groups only grow, and only the newest is served.

    The public methods may be called from any thread but the endpoint's own, `serve` and `leave` only there.

    Args:
        listen: address to listen on; port 0 takes a free one.
        identity: of the run, for mutual TLS; None means that nothing is encrypted.
        handlers: of further methods, by name as in `/mlx_distributed.v1.Service/Method`.

    Raises:
        CommError: the address cannot be listened on.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        identity: Identity | None = None,
        handlers: Mapping[str, Handler] | None = None,
    ) -> None:
        self.identity = identity
        self._newest = -1
        self._final = False
        """No generation follows the newest."""
        self._streams: Streams | None = None
        """Of the newest generation, until it is over."""
        self._server: grpc.aio.Server | None = None
        self._num_strangers = 0
        self._change = asyncio.Event()
        """Set, and replaced by another, when there is a generation that was not known."""
        self._closed = False
        self._lock = threading.Lock()
        """Held where `_closed` is read or written: what is handed to the loop after its end would never be done."""
        self._pending: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        try:
            self.address = self.run(self._listen(listen, handlers or {}))
        except CommError:
            self.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Have the endpoint's loop run a coroutine, and wait for it.

        Raises:
            CommError: the endpoint is closed.
        """
        return self.start(coroutine).result()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the endpoint's loop run a coroutine. On a closed endpoint the future has failed with `CommError`."""
        with self._lock:
            if not self._closed:
                future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
                self._pending.add(future)
                future.add_done_callback(self._pending.discard)
                return future
        coroutine.close()
        failed: Future[T] = Future()
        failed.set_exception(CommError("a call", None, max(self._newest, 0), 0.0, "the endpoint is closed"))
        return failed

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Have the endpoint's loop call a function, after what it was given before. Nothing, where it is closed."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """Listen no more. A group that is still open fails, and its peers are told."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        closing.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def serve(self, streams: Streams, final: bool) -> None:
        """Hand the streams of a new generation over to `streams` from now on.

        Args:
            streams: of a generation above all those before.
            final: no other will follow, so that there is no use in waiting for it.
        """
        assert streams.generation > self._newest
        self._streams, self._newest, self._final = streams, streams.generation, final
        self._wake()

    async def leave(self, streams: Streams) -> None:
        """The generation of `streams` is over: let go of them."""
        if self._streams is streams:
            self._streams = None
        await streams.close()

    async def _listen(self, address: str, handlers: Mapping[str, Handler]) -> str:
        server = grpc.aio.server(options=OPTIONS)
        methods = {name: grpc.unary_stream_rpc_method_handler(handler) for name, handler in handlers.items()}
        methods[EXCHANGE] = grpc.stream_stream_rpc_method_handler(self._attend)
        server.add_generic_rpc_handlers((_Methods(methods),))
        try:
            if self.identity is None:
                port = server.add_insecure_port(address)
            else:
                key, certificate = self.identity.key.encode(), self.identity.certificate.encode()
                credentials = grpc.ssl_server_credentials([(key, certificate)], certificate, require_client_auth=True)
                port = server.add_secure_port(address, credentials)
        except RuntimeError:
            reason = f"cannot listen on {address}; is the port in use? Choose another, or 0 for a free one"
            raise CommError("listen", None, 0, 0.0, reason) from None
        await server.start()
        self._server = server
        return f"{address.rpartition(':')[0]}:{port}"

    async def _attend(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """One incoming stream, to its end."""
        if self._num_strangers >= MAX_STRANGERS:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "too many connections at a time")
        self._num_strangers += 1
        try:
            hello = pb.Hello.FromString(await asyncio.wait_for(read_bytes(context.read), HELLO_S))
            known = await self._known(hello.generation)
        except (ConnectionError, DecodeError, TimeoutError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a Hello")
        finally:
            self._num_strangers -= 1
        if not known:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the group has not begun there")
        elif self._streams is None or hello.generation < self._newest:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"generation {hello.generation} is over")
        else:
            await self._streams.accept(hello, context)

    async def _known(self, generation: int) -> bool:
        """Whether the generation has begun here, for which it has some time: a peer may enter it a moment before us."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELLO_S):
                while generation > self._newest and not self._final and not self._closed:
                    await self._change.wait()
        return not self._closed and (generation <= self._newest or self._final)

    def _wake(self) -> None:
        """Those that wait for a change look again, once each."""
        self._change.set()
        self._change = asyncio.Event()

    async def _close(self) -> None:
        self._wake()
        if self._streams is not None:
            self._streams.fail("the endpoint is closed")
            await self.leave(self._streams)
        if pending := [asyncio.wrap_future(future) for future in self._pending]:
            await asyncio.wait(pending, timeout=LINGER_S)
            for future in pending:
                future.cancel()
        if self._server is not None:
            await self._server.stop(grace=LAST_S)


class _Methods(grpc.GenericRpcHandler):
    """By their full names."""

    def __init__(self, methods: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._methods = methods

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(handler_call_details.method)
