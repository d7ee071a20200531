"""The link of a rank, measured with all others at once.

A rank that is measured is the centre of a star: it sends to all others, and they to it, for `PROBE_S`, and each counts
what comes in. What two ranks give between them would not do: of a fast link it shows what the slower one at its other
end takes. Nor would the time until all is there: what was lost and sent again at the end may take longer than the rest.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import deque

from mlx_distributed.comm.link_speed import LinkSpeed, both_ways
from mlx_distributed.comm.session import Session
from mlx_distributed.comm.wire import NOT_AS_EXPECTED, Frame, Kind

WARMUP_S, PROBE_S = 0.03, 0.12
"""What comes in between the two counts: before, TCP is getting up to speed. With these, three equal links of 100 Mbit/s
or 1 Gbit/s, on a machine with other work, had figures at most 1.24 apart in 24 runs, 1.05 in half of them."""
FIRST_BYTES, EQUAL_MESSAGES = 16 << 10, 8
"""Of a message, and how many there are of the same size before they are twice as large: a slow link must bring several
messages in `PROBE_S`, and a fast one is not to be busy with their headers."""
MAX_BYTES = 256 << 10
MAX_UNREAD_BYTES = 4 << 20
NUM_PINGS = 3

_READ = b"r"
"""Said for each message that was read."""

_WHAT = "the measurement of a link"


async def probe(session: Session, size: int, centre: int, tag: int) -> LinkSpeed | None:
    """Measure the link of one rank; called on all ranks, in the loop of the session.

    Args:
        session: of a group that does nothing else meanwhile.
        size: of the group, at least 2.
        centre: the rank that is measured.
        tag: of messages that nothing else uses.

    Returns:
        The figures on the rank that is measured, None on the others.

    Raises:
        CommError: a rank is lost.
    """
    if session.rank != centre:
        await _follow(session, centre, tag)
        return None
    peers = [peer for peer in range(size) if peer != centre]
    round_trip_s = min([await _ping(session, peer, tag) for peer in peers for _ in range(NUM_PINGS)])
    received = sum(await asyncio.gather(*(_exchange(session, peer, tag) for peer in peers)))
    sent = sum([counted(await session.take(peer, tag, _WHAT)) for peer in peers])
    return LinkSpeed(both_ways(sent, received), round_trip_s)


def counted(chunks: list[bytes | memoryview]) -> float:
    """The bytes per second that a peer says it has counted, in a message of it; 0 where that is no such number."""
    try:
        number = float(json.loads(bytes(chunks[0])))
    except NOT_AS_EXPECTED:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


async def _follow(session: Session, centre: int, tag: int) -> None:
    """Do what the centre of the star asks for, and tell it how fast it was."""
    for _ in range(NUM_PINGS):
        await session.take(centre, tag, _WHAT)
        _post(session, centre, tag)
    rate = await _exchange(session, centre, tag)
    _post(session, centre, tag, json.dumps(rate).encode())


async def _ping(session: Session, peer: int, tag: int) -> float:
    start_s = time.perf_counter()
    _post(session, peer, tag)
    await session.take(peer, tag, _WHAT)
    return time.perf_counter() - start_s


async def _exchange(session: Session, peer: int, tag: int) -> float:
    """Send to a peer for a while, as it does to us; the bytes per second that have come from it."""
    flow = Flow()
    sending = asyncio.create_task(_send(session, peer, tag, flow))
    num_counted, num_received, begun_s, ended_s = 0, 0, time.perf_counter(), 0.0
    try:
        while not (ended_s and flow.ended):
            num_bytes = len((await session.take(peer, tag, _WHAT))[0])
            if num_bytes == len(_READ):
                flow.read()
                continue
            _post(session, peer, tag, _READ)
            passed_s = time.perf_counter() - begun_s
            num_received += num_bytes
            if WARMUP_S <= passed_s < PROBE_S:
                num_counted += num_bytes
            if num_bytes == 0:
                ended_s = passed_s
    finally:
        sending.cancel()
    # A slow link may bring its first message after the time in which fast ones are counted.
    return max(num_counted / (PROBE_S - WARMUP_S), num_received / ended_s)


class Flow:
    """What was sent to a peer and it has not read yet: no more than twice what it has read. All that waits on the way
    holds up what comes later, for minutes where a link has just become slow."""

    def __init__(self) -> None:
        self.ended = False
        """The last message, with nothing in it, was read."""
        self._unread, self._num_read = deque[int](), 0
        self._has_read = asyncio.Event()

    async def room(self) -> None:
        """Wait until another message may be sent."""
        while sum(self._unread) > min(FIRST_BYTES + 2 * self._num_read, MAX_UNREAD_BYTES):
            self._has_read.clear()
            await self._has_read.wait()

    def sent(self, num_bytes: int) -> None:
        self._unread.append(num_bytes)

    def read(self) -> None:
        """The peer has read the oldest message."""
        if not self._unread:
            return  # It says so more often than there were any.
        num_bytes = self._unread.popleft()
        self._num_read += num_bytes
        self.ended = num_bytes == 0
        self._has_read.set()


async def _send(session: Session, peer: int, tag: int, flow: Flow) -> None:
    """Send for a while, and then a message with nothing in it."""
    limit_s, payload = time.perf_counter() + PROBE_S, memoryview(bytes(MAX_BYTES))
    for number in itertools.count():
        await flow.room()
        if time.perf_counter() >= limit_s:
            break
        message = payload[: FIRST_BYTES << number // EQUAL_MESSAGES]
        _post(session, peer, tag, message)
        flow.sent(len(message))
    _post(session, peer, tag)
    flow.sent(0)


def _post(session: Session, peer: int, tag: int, payload: bytes | memoryview = b"") -> None:
    session.post([(peer, Frame(Kind.MESSAGE, tag, 0, 0, 0, 1, payload))])
