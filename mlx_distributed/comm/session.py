"""What a rank knows of its group while it is connected: links, the operation under way, messages, the first failure.

Lives in the thread of one asyncio loop and knows no transport: a `Link` reads and writes bytes, and raises
`ConnectionError` when its stream has ended.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

import numpy as np

from mlx_distributed.comm.changes import Changes
from mlx_distributed.comm.mailbox import MAX_UNREAD_BYTES, Mailbox
from mlx_distributed.comm.reduction import Outgoing, Reduction
from mlx_distributed.comm.tree_sum import Node
from mlx_distributed.comm.wire import (
    HEADER_BYTES,
    NOT_AS_EXPECTED,
    SMALL_BYTES,
    Frame,
    FrameError,
    Kind,
    Message,
    decode,
)
from mlx_distributed.errors import CommError

LINGER_S = 0.5
"""How long a rank that leaves because of a failure waits for its peers to read the reason."""

MAX_QUEUED = 2
"""Frames of this rank's parts that wait for the stream to a peer at a time."""

MAX_REASON_CHARS = 2000
"""Of what a peer says on leaving."""

_OF_A_REDUCTION = (Kind.PART, Kind.END, Kind.RESULT)


class Link:
    """The stream to one peer."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Awaitable[None]]) -> None:
        self.read, self.write = read, write
        self.queue: asyncio.Queue[Message | None] = asyncio.Queue()
        """To be sent; None ends it."""
        self.moved_s = time.monotonic()
        """When a frame last went either way: a peer that still takes what we send is not silent."""
        self.left = False
        """The peer has taken its leave, or is gone."""


class Session:
    """State of one rank in one group; every method runs in the loop's thread.

    Args:
        rank: of this worker.
        generation: of the group, for errors.
        tag: that every frame of the group begins with.
        timeout_s: a peer that is waited for and sends nothing for so long is given up.
    """

    def __init__(self, rank: int, generation: int, tag: int, timeout_s: float) -> None:
        self.rank, self.generation, self.timeout_s = rank, generation, timeout_s
        self.links: dict[int, Link] = {}
        self.absent: dict[int, str] = {}
        """What is known of why a peer has no link yet."""
        self.sent_bytes = 0
        """To all peers, with headers; what is still queued counts as sent."""
        self.failure: tuple[int | None, str] | None = None
        """The rank that caused the first failure, and the reason; the session is dead from then on."""
        self._held_up: dict[int, tuple[int, str]] = {}
        """For whom peers wait, and for how long that one has been silent."""
        self._told: int | None = None
        """For whom the peers know that we wait."""
        self._tag = tag
        self._reduction: Reduction | None = None
        self._op = 0
        self._mailbox = Mailbox()
        self._awaited: tuple[int, int] | None = None
        """Peer and tag of the message that is waited for."""
        self._message: Message | None = None
        """The last one queued: the next peer may get the same."""
        self._outbox: deque[tuple[Iterator[Outgoing], Callable[[], bool]]] = deque()
        """What is still to be queued, and from when on: frames are made as they are asked for."""
        self._pump: asyncio.Task[None] | None = None
        """Empties the outbox. Nobody waits for it, and a loop holds on to its tasks only weakly."""
        self._num_senders = 0
        """That wait for room in the queue of some peer."""
        self._changes = Changes()
        self._waits: list[dict[int, float]] = []
        """Whom each call that waits waits for, and since when of the monotonic clock."""

    def error(self, name: str, start_s: float) -> CommError:
        """The failure as the error of the operation `name`, begun at `start_s` of the monotonic clock."""
        assert self.failure is not None
        peer, reason = self.failure
        return CommError(name, peer, self.generation, time.monotonic() - start_s, reason)

    def fail(self, peer: int | None, reason: str) -> None:
        """Record the first failure and tell the peers."""
        if self.failure is not None:
            return
        self.failure = (peer, reason)
        unfinished = self._op + 1 if self._reduction is None else self._op
        payload = json.dumps({"peer": self.rank if peer is None else peer, "reason": reason}).encode()
        for link in self.links.values():
            queued = [link.queue.get_nowait() for _ in range(link.queue.qsize())]
            for item in queued:  # Only what we have finished is of use to a peer, which may be about to finish it too.
                if item is not None and item.frame.kind in _OF_A_REDUCTION and item.frame.op < unfinished:
                    link.queue.put_nowait(item)
            self._leave(link, Frame(Kind.ABORT, payload=payload))
        self._changes.notify()

    def silent(self, for_s: float) -> list[int]:
        """The ranks that are waited for, and have been silent for so long."""
        return sorted({peer for since_s in self._waits for peer in since_s if self._silent_s(peer, since_s) >= for_s})

    def _held_up_by(self, besides: int) -> tuple[int, str] | None:
        """The rank that we have waited for, and that has been silent, for much of the deadline; and for how long."""
        waits = [(self._silent_s(peer, since_s), peer) for since_s in self._waits for peer in since_s]
        silent_s, peer = max((wait for wait in waits if wait[1] != besides), default=(0.0, besides))
        return (peer, f"sent nothing for {silent_s:.1f} s") if silent_s >= self.timeout_s / 2 else None

    def begin(self, reduction: Reduction) -> None:
        """Start an operation: frames of it are taken in from now on."""
        self._op, self._reduction = reduction.op, reduction
        self._changes.notify()

    def contribute(
        self, reduction: Reduction, index: int, parts: Mapping[Node, np.ndarray], result: np.ndarray, last: bool
    ) -> None:
        """Put in this rank's parts of one bucket."""
        self._put_out(reduction.contribute(index, parts, result), lambda: not parts or reduction.has_room(index))
        if last:  # Here, and not in a call of its own, so that small parts and the end are one message.
            self.end(reduction)

    def end(self, reduction: Reduction) -> None:
        """This rank has no more parts."""
        self._put_out(reduction.end())

    def post(self, outgoing: Iterable[Outgoing]) -> None:
        """Queue frames for their peers."""
        for peer, frame in outgoing:
            self._queue(peer, frame)

    async def take(self, peer: int, tag: int, name: str) -> list[bytes | memoryview]:
        """The chunks of the next message of `peer` with this tag."""
        self._awaited = (peer, tag)
        self._changes.notify()
        await self.wait(name, lambda: self._mailbox.has(peer, tag), lambda: {peer}, time.monotonic())
        self._awaited = None
        chunks = self._mailbox.take(peer, tag)
        self._changes.notify()
        return chunks

    async def wait(
        self, name: str, done: Callable[[], bool], waiting_for: Callable[[], set[int]], begun_s: float
    ) -> None:
        """Wait until `done`, in an operation that began at `begun_s` of the monotonic clock.

        Raises:
            CommError: the session has failed, or a peer that is waited for has left or been silent for `timeout_s`.
        """
        since_s: dict[int, float] = {}
        self._waits.append(since_s)
        try:
            while not done():
                if self.failure is not None:
                    raise self.error(name, begun_s)
                left_s, peers = self.timeout_s, waiting_for()
                for peer in since_s.keys() - peers:
                    del since_s[peer]
                for peer in sorted(peers):
                    since_s.setdefault(peer, time.monotonic())
                    link = self.links.get(peer)
                    silent_s = self._silent_s(peer, since_s)
                    half_s = self.timeout_s / 2
                    left_s = min(left_s, (half_s if silent_s < half_s else self.timeout_s) - silent_s)
                    if link and link.left:
                        self.fail(peer, "has left the group")
                    elif silent_s >= self.timeout_s:
                        reason = f"sent nothing for {silent_s:.1f} s"
                        self._give_up(peer, reason if link else f"{reason} ({self.absent[peer]})")
                if self.failure is None:
                    self._say_who_holds_us_up()
                    await self._changes.next(left_s)
        finally:
            self._waits, self._told = [other for other in self._waits if other is not since_s], None

    async def carry(self, peer: int, link: Link) -> None:
        """Read from and write to a peer until both sides have taken their leave, or the stream ends."""
        self.links[peer] = link
        self._changes.notify()
        if self.failure is not None:
            self._leave(link, Frame(Kind.BYE))
        writer = asyncio.create_task(self._write(link))
        writer.add_done_callback(lambda _: self._changes.notify())
        try:
            while not link.left:
                data = await link.read()
                for frame in decode(self._tag, data):
                    if frame.kind is not Kind.WAITING:
                        link.moved_s = time.monotonic()
                        self._held_up.pop(peer, None)
                    await self._receive(peer, link, frame)
        except FrameError as error:
            self.fail(peer, str(error))
        except ConnectionError as error:
            self.fail(peer, f"is gone ({error})")
        except asyncio.CancelledError:
            writer.cancel()
            raise
        finally:
            link.left = True
            self._changes.notify()
            # In peace this takes as long as our own work; after a failure only what it takes to say so.
            await self._until(writer.done)
            await asyncio.wait([writer], timeout=LINGER_S)
            writer.cancel()

    async def close(self) -> None:
        """Say goodbye to every peer and wait until they have done so too, within the deadline; or for the failure."""
        if self.failure is None:
            for link in self.links.values():
                self._leave(link, Frame(Kind.BYE))
            await self._until(lambda: not self._staying(), self.timeout_s)
            if self._staying():
                self.fail(min(self._staying()), "did not take its leave")

    async def linger(self) -> None:
        """Until every peer has left, but not for long."""
        limit_s = time.monotonic() + LINGER_S
        while self._staying() and (left_s := limit_s - time.monotonic()) > 0:
            await self._changes.next(left_s)

    def _staying(self) -> set[int]:
        """The peers that have not left."""
        return {peer for peer, link in self.links.items() if not link.left}

    def _silent_s(self, peer: int, since_s: Mapping[int, float]) -> float:
        """For how long nothing has gone either way, while the peer was waited for."""
        link = self.links.get(peer)
        return time.monotonic() - max(link.moved_s if link else -math.inf, since_s[peer])

    def _leave(self, link: Link, frame: Frame) -> None:
        link.queue.put_nowait(Message(frame))
        link.queue.put_nowait(None)

    async def room(self, link: Link) -> None:
        """Until the stream to a peer can do with another frame."""
        self._num_senders += 1
        try:
            await self._until(lambda: link.queue.qsize() < MAX_QUEUED)
        finally:
            self._num_senders -= 1

    def _queue(self, peer: int, frame: Frame) -> None:
        if self.failure is not None:
            return
        if self._message is None or self._message.frame is not frame:
            self._message = Message(frame)
        self.sent_bytes += HEADER_BYTES + len(frame.payload)
        self.links[peer].queue.put_nowait(self._message)

    def _put_out(self, outgoing: Iterator[Outgoing], has_room: Callable[[], bool] = lambda: True) -> None:
        """Queue frames when there is room for them all, and as their peers can take them; those of a later call follow
        those of an earlier one."""
        self._outbox.append((outgoing, has_room))
        if len(self._outbox) == 1:
            self._pump = asyncio.create_task(self._empty_outbox())

    async def _empty_outbox(self) -> None:
        """A frame is made, which with a lossy wire format takes as long as to send it, when there is room for it: what
        is under way is bounded, and the line and the codec work at the same time."""
        try:
            while self._outbox:
                outgoing, has_room = self._outbox[0]
                await self._until(has_room)
                for peer, frame in outgoing:
                    await self.room(self.links[peer])
                    if self.failure is not None:
                        break
                    self._queue(peer, frame)
                self._outbox.popleft()
        except FrameError as error:
            self.fail(self.rank, str(error))
            self._outbox.clear()
        if self._reduction is not None and self._reduction.done:
            self._reduction = None
        self._changes.notify()

    async def _write(self, link: Link) -> None:
        message: Message | None
        while True:
            batch: list[bytes] = []
            message = await link.queue.get()
            while message is not None:
                batch.append(message.encoded(self._tag))
                if link.queue.empty() or sum(map(len, batch)) >= SMALL_BYTES:
                    break
                message = link.queue.get_nowait()
            try:
                if batch:
                    await link.write(batch[0] if len(batch) == 1 else b"".join(batch))
            except ConnectionError:
                return  # The reading side of the same stream sees it too, and names the peer.
            link.moved_s = time.monotonic()
            if message is None:
                return
            if self._num_senders:
                self._changes.notify()

    async def _receive(self, peer: int, link: Link, frame: Frame) -> None:
        if frame.kind is Kind.BYE:
            link.left = True
        elif frame.kind is Kind.ABORT:
            link.left = True
            self._aborted(peer, frame)
        elif frame.kind is Kind.WAITING:
            self._hear(peer, frame)
        elif frame.kind is Kind.MESSAGE:
            full = lambda: self._mailbox.unread_bytes[peer] > MAX_UNREAD_BYTES  # noqa: E731
            await self._until(lambda: not full() or self._awaits_from(peer))
            if full() and self._awaited != (peer, frame.op):
                raise FrameError(f"sent more than {MAX_UNREAD_BYTES >> 20} MiB that nobody has asked for")
            self._mailbox.put(peer, frame)
        else:
            # A peer may be one operation ahead. Not reading on until we get there bounds what it can make us hold.
            await self._until(lambda: self._op >= frame.op)
            # Nor may it be far ahead of us within one.
            await self._until(lambda: self._reduction is None or self._reduction.is_due(frame))
            if self._reduction is None or self._reduction.op != frame.op:
                raise FrameError(f"sent a frame of operation {frame.op}, and this is operation {self._op}")
            self.post(self._reduction.receive(peer, frame))
            if self._reduction.done:
                self._reduction = None
        self._changes.notify()

    def _awaits_from(self, peer: int) -> bool:
        return self._awaited is not None and self._awaited[0] == peer

    def _aborted(self, peer: int, frame: Frame) -> None:
        culprit, reason = self._hear(peer, frame)
        if culprit == self.rank:  # Who waits for us does not see for whom we wait.
            culprit, reason = self._held_up_by(peer) or (peer, f"gave this worker up: {reason}")
        self.fail(culprit, reason)

    def _hear(self, peer: int, frame: Frame) -> tuple[int, str]:
        """The rank that a peer speaks of, and what it says of it; kept, if the peer waits for it."""
        try:
            said = json.loads(bytes(frame.payload))
            other, reason = int(said["peer"]), str(said["reason"])[:MAX_REASON_CHARS]
        except NOT_AS_EXPECTED:
            raise FrameError(f"{'waits' if frame.kind is Kind.WAITING else 'left'} without a reason") from None
        if frame.kind is Kind.WAITING and other in self.links:
            self._held_up[peer] = other, reason
        return other, reason

    def _say_who_holds_us_up(self) -> None:
        """In the middle of a deadline, as others may wait for us: in a pipeline all wait for one, in a chain."""
        if (held_up := self._held_up_by(self.rank)) and held_up[0] != self._told:
            self._told, reason = held_up
            payload = json.dumps({"peer": self._told, "reason": reason}).encode()
            self.post((peer, Frame(Kind.WAITING, payload=payload)) for peer in self.links if peer != self._told)

    def _give_up(self, peer: int, reason: str) -> None:
        """Give up a peer that is silent, or the one at the end of the chain where it waits for another one."""
        while peer in self._held_up:
            peer, reason = self._held_up.pop(peer)
        self.fail(peer, reason)

    async def _until(self, condition: Callable[[], bool], timeout_s: float = math.inf) -> None:
        """Until the condition holds, the session has failed, or the time is up."""
        limit_s = time.monotonic() + timeout_s
        while not condition() and self.failure is None and (left_s := limit_s - time.monotonic()) > 0:
            await self._changes.next(None if left_s == math.inf else left_s)
