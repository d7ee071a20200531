"""A network on the loopback interface that can be cut: every connection goes through a relay.

Seen from the other side of the relays, a host whose connections are reset and whose addresses refuse new ones has
died, and one of which nothing comes while its connections stay has stopped. What becomes of the threads of such a host
is not seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

CHUNK_BYTES = 16 << 10

T = TypeVar("T")


@dataclass(eq=False)
class Host:
    """A process, as far as the network knows it."""

    name: str
    address: str = ""
    """Where it really listens."""
    dead: bool = False
    stopped: bool = False
    comes_back: bool = False
    """Its ways stay when it dies, and lead to the next that has its place."""
    sent_bytes: int = 0
    """Through relays."""
    alarms: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)
    """What is called before more than so many bytes are sent, the fewest first. In the thread of the network."""


class Network:
    """Relays in a thread of their own. The methods may be called from any thread; none but `way` and `close` blocks."""

    def __init__(self) -> None:
        self._ways: dict[tuple[Host | None, Host], str] = {}
        self._listeners: dict[tuple[Host | None, Host], asyncio.Server] = {}
        self._parted: set[frozenset[Host]] = set()
        """Pairs between which nothing passes."""
        self._streams: dict[asyncio.StreamWriter, tuple[Host | None, Host]] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._change = asyncio.Event()
        """Set, and replaced by another, when something may pass that could not before."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def way(self, source: Host | None, target: Host) -> str:
        """Address at which `source` reaches `target`; that of anybody else is the way from None."""
        with self._lock:
            if (source, target) not in self._ways:
                self._ways[source, target] = self._run(self._listen(source, target))
            return self._ways[source, target]

    def host_at(self, address: str) -> Host:
        """Whose the way from None at this address is."""
        with self._lock:
            return next(target for (source, target), way in self._ways.items() if source is None and way == address)

    def kill(self, host: Host) -> None:
        """Its connections are reset, and new ones refused."""
        host.dead = True
        self._loop.call_soon_threadsafe(self._reset, host)

    def stop(self, host: Host, stopped: bool) -> None:
        """Nothing comes from it or gets to it, or again does; connections stay."""
        host.stopped = stopped
        self._loop.call_soon_threadsafe(self._wake)

    def part(self, one: Host, other: Host, parted: bool) -> None:
        """Nothing passes between two, or again does; connections stay."""
        (self._parted.add if parted else self._parted.discard)(frozenset((one, other)))
        self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Everything below runs in the loop.

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _wake(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _reset(self, host: Host) -> None:
        for pair, listener in self._listeners.items():
            if host in pair and not (host.comes_back and pair[1] is host):
                listener.close()
        for writer, pair in self._streams.items():
            if host in pair:
                writer.transport.abort()
        self._wake()

    async def _listen(self, source: Host | None, target: Host) -> str:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # At the end it is cancelled; a callback of asyncio would complain of a task that says so.
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await self._relay(source, target, reader, writer)

        listener = await asyncio.start_server(relay, "127.0.0.1", 0)
        self._listeners[source, target] = listener
        return f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"

    async def _relay(
        self, source: Host | None, target: Host, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection."""
        self._streams[writer] = (source, target)
        far: asyncio.StreamWriter | None = None
        try:
            await self._passes(source, target, 0)
            host, _, port = target.address.rpartition(":")
            far_reader, far = await asyncio.open_connection(host, int(port))
            self._streams[far] = (source, target)
            pumps = {
                asyncio.create_task(self._pump(reader, far, source, target)),
                asyncio.create_task(self._pump(far_reader, writer, target, source)),
            }
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            for each in filter(None, (writer, far)):
                del self._streams[each]
                each.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sender: Host | None, receiver: Host | None
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._passes(sender, receiver, len(data))
            writer.write(data)
            await writer.drain()

    async def _passes(self, sender: Host | None, receiver: Host | None, num_bytes: int) -> None:
        """Returns when so many bytes may pass.

        Raises:
            ConnectionError: one of the two is dead.
        """
        if sender is not None:
            sender.sent_bytes += num_bytes
            while sender.alarms and sender.alarms[0][0] < sender.sent_bytes:
                sender.alarms.popleft()[1]()
        both = [host for host in (sender, receiver) if host is not None]
        while not any(host.dead for host in both):
            if not any(host.stopped for host in both) and frozenset(both) not in self._parted:
                return
            await self._change.wait()
        raise ConnectionResetError

    async def _close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        await asyncio.sleep(0)
        # Those of connections that asyncio is just taking among them.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):  # Transports are closed by callbacks.
            await asyncio.sleep(0)
