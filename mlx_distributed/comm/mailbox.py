"""Point-to-point arrays as they arrive: put together from chunks, and kept until somebody asks for them."""

from __future__ import annotations

from collections import defaultdict, deque

from mlx_distributed.comm.wire import CHUNK_BYTES, Frame, FrameError

MAX_UNREAD_BYTES = 256 << 20
"""A peer that has sent so much that nobody has asked for is not read from until somebody does."""

CHUNK_COST_BYTES = 128
"""What a chunk costs besides its bytes, so that empty ones count too."""

Chunks = list[bytes | memoryview]


class Mailbox:
    """Arrays from the peers, by peer and tag, in the order sent. Used by one thread only."""

    def __init__(self) -> None:
        self._partial: dict[tuple[int, int], Chunks] = {}
        self._ready: defaultdict[tuple[int, int], deque[Chunks]] = defaultdict(deque)
        self.unread_bytes: defaultdict[int, int] = defaultdict(int)
        """By peer."""

    def put(self, peer: int, frame: Frame) -> None:
        """Take in one MESSAGE frame.

        Raises:
            FrameError: the chunk is not the next one of its message.
        """
        key = (peer, frame.op)
        chunks = self._partial.setdefault(key, [])
        if frame.chunk != len(chunks) or frame.chunk >= frame.hi or len(frame.payload) > CHUNK_BYTES:
            raise FrameError(f"sent chunk {frame.chunk} of {frame.hi} where chunk {len(chunks)} was due")
        chunks.append(frame.payload)
        self.unread_bytes[peer] += len(frame.payload) + CHUNK_COST_BYTES
        if len(chunks) == frame.hi:
            self._ready[key].append(self._partial.pop(key))

    def has(self, peer: int, tag: int) -> bool:
        """Whether a whole array is there."""
        return bool(self._ready.get((peer, tag)))

    def take(self, peer: int, tag: int) -> Chunks:
        """The oldest whole array of this peer and tag, as chunks; it must be there."""
        queue = self._ready[(peer, tag)]
        chunks = queue.popleft()
        if not queue:
            del self._ready[(peer, tag)]
        self.unread_bytes[peer] -= sum(len(chunk) + CHUNK_COST_BYTES for chunk in chunks)
        return chunks
