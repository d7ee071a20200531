"""The gRPC streams of one rank: it dials the higher ranks, is dialled by the lower ones through its `Endpoint`, and
hands a stream over to the session when it knows whose it is.

There is one long-lived stream per pair of ranks, dialled by the lower one; its first message each way is a protobuf
`Hello`, all others are the session's. Every method runs in the thread of the endpoint's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mlx_distributed.comm._pb import collective_pb2 as pb
from mlx_distributed.comm.hello import Membership
from mlx_distributed.comm.session import LINGER_S, Link, Session
from mlx_distributed.comm.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity  # imports a library that a group without TLS need not wait for

Channel = grpc.aio.Channel

SERVICE, METHOD = "mlx_distributed.v1.Collective", "Exchange"
EXCHANGE = f"/{SERVICE}/{METHOD}"

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
    # A connection for every stream: a new one must not stand behind what an old one has not yet got rid of.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

CONNECT_S = 2.0
"""An attempt to connect may take so long: on Wi-Fi some need half a second."""
REDIAL_S = 0.05
"""A peer that cannot be reached is dialled again after this."""

_RPC_ERRORS = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


def open_channel(address: str, identity: Identity | None, connect_s: float = CONNECT_S) -> grpc.aio.Channel:
    """A channel to another worker.

    Args:
        address: of its endpoint.
        identity: of the run, for mutual TLS; None means that nothing is encrypted.
        connect_s: an attempt to connect may take so long; a refusal is known at once.
    """
    options: list[tuple[str, int | str]] = [*OPTIONS, ("grpc.min_reconnect_backoff_ms", int(connect_s * 1000))]
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    key, certificate = identity.key.encode(), identity.certificate.encode()
    credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
    options.append(("grpc.ssl_target_name_override", identity.server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


class Streams:
    """Streams to all peers.

    Args:
        member: who this rank is.
        session: that streams are handed over to, and that hears of failures.
        identity: of the run, for mutual TLS; None means that nothing is encrypted.
    """

    def __init__(self, member: Membership, session: Session, identity: Identity | None) -> None:
        self._member, self._session, self._identity = member, session, identity
        self._dialling: dict[int, asyncio.Task[None]] = {}
        """By peer."""
        self._carrying: set[asyncio.Task[None]] = set()
        """Of the streams that are up."""

    @property
    def generation(self) -> int:
        """Of the group."""
        return self._member.generation

    def fail(self, reason: str) -> None:
        """Give the group up."""
        self._session.fail(None, reason)

    async def connect(self, addresses: Sequence[str]) -> None:
        """Dial the higher ranks, wait for the lower ones.

        Raises:
            CommError: a peer did not come, or was refused.
        """
        rank, size, links = self._member.rank, self._member.size, self._session.links
        peers = set(range(size)) - {rank}
        how = "" if self._identity is None else " with the certificate of this run"
        self._session.absent = dict.fromkeys(peers, f"no connection{how}")
        for peer in range(rank + 1, size):
            self._dialling[peer] = asyncio.create_task(self._dial(peer, addresses[peer]))
        begun_s = time.monotonic()
        await self._session.wait("connect", lambda: peers <= links.keys(), lambda: peers - links.keys(), begun_s)

    async def close(self) -> None:
        """Let go of all streams: as soon as the peers have, or in `LINGER_S`."""
        begun_s = time.monotonic()
        for peer, task in self._dialling.items():
            if peer not in self._session.links:  # At once: we might yet be taken for a member.
                task.cancel()
        await self._session.linger()
        tasks = [*self._carrying, *self._dialling.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=max(LINGER_S - (time.monotonic() - begun_s), 0.0))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def accept(self, hello: pb.Hello, context: grpc.aio.ServicerContext) -> None:
        """A stream that has come in, from its Hello to its end; called in a task of its own."""
        refusal = self._member.refusal(hello, set(range(self._member.rank)) - self._session.links.keys())
        if refusal:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, refusal)
        await context.write(self._member.hello().SerializeToString())
        await self._carry(hello.rank, _link(context.read, context.write))

    async def _carry(self, peer: int, link: Link) -> None:
        # In a task of its own: the stream of a peer that does not leave is ended by a return, as gRPC tells nobody of a
        # handler that was cancelled.
        carrying = asyncio.create_task(self._session.carry(peer, link))
        self._carrying.add(carrying)
        try:
            await asyncio.wait([carrying])
        finally:
            carrying.cancel()
            self._carrying.discard(carrying)

    async def _dial(self, peer: int, address: str) -> None:
        async with open_channel(address, self._identity) as channel:
            while True:
                call = channel.stream_stream(EXCHANGE)()
                try:
                    await call.write(self._member.hello().SerializeToString())
                    answer = pb.Hello.FromString(await read_bytes(call.read))
                    break
                except (ConnectionError, DecodeError, *_RPC_ERRORS):
                    await self._not_reached(peer, address, call)
                if self._session.failure is not None:
                    return
            refusal = self._member.refusal(answer, {peer} - self._session.links.keys())
            if refusal:
                self._session.fail(peer, f"answers at {address} as somebody else: {refusal}")
                return
            await self._carry(peer, _link(call.read, call.write))
            # The stream is torn down only when the peer has read our last frame and ended its side.
            await call.done_writing()
            await call.read()

    async def _not_reached(self, peer: int, address: str, call: grpc.aio.Call) -> None:
        """Fail where it is for good; otherwise note why, and wait until it is worth another try."""
        details, over_tls = await call.details(), self._identity is not None
        if over_tls and "handshake failed" in details.lower():
            self._session.fail(peer, f"does not show the certificate of this run at {address}")
        elif await call.code() is not grpc.StatusCode.UNAVAILABLE:
            self._session.fail(peer, f"refused the connection: {details}")
        else:
            how = "with" if over_tls else "without"
            self._session.absent[peer] = f"dialled at {address} {how} TLS: {details.rpartition(': ')[2]}"
            await asyncio.sleep(REDIAL_S)


async def read_bytes(read: Callable[[], Awaitable[Any]]) -> bytes:
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

    return Link(lambda: read_bytes(read), checked_write)
