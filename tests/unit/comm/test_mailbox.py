from __future__ import annotations

import pytest

from mlx_distributed.comm.mailbox import CHUNK_COST_BYTES, Mailbox
from mlx_distributed.comm.wire import CHUNK_BYTES, Frame, FrameError, Kind


def message(tag: int, chunk: int, num_chunks: int, payload: bytes = b"x") -> Frame:
    return Frame(Kind.MESSAGE, tag, 0, chunk, 0, num_chunks, payload)


def test_messages_come_out_by_peer_and_tag_in_the_order_sent() -> None:
    mailbox = Mailbox()
    mailbox.put(1, message(5, 0, 2, b"a"))
    mailbox.put(2, message(5, 0, 1, b"other"))
    mailbox.put(1, message(6, 0, 1, b"c"))
    assert not mailbox.has(1, 5)
    mailbox.put(1, message(5, 1, 2, b"b"))
    mailbox.put(1, message(5, 0, 1, b"later"))
    assert mailbox.unread_bytes == {1: 8 + 4 * CHUNK_COST_BYTES, 2: 5 + CHUNK_COST_BYTES}
    assert [mailbox.take(1, 5), mailbox.take(1, 5), mailbox.take(1, 6)] == [[b"a", b"b"], [b"later"], [b"c"]]
    assert not mailbox.has(1, 5)
    assert mailbox.unread_bytes == {1: 0, 2: 5 + CHUNK_COST_BYTES}


@pytest.mark.parametrize(
    "frame", [message(5, 1, 2), message(5, 0, 0), message(5, 3, 2), message(5, 0, 1, b"x" * (CHUNK_BYTES + 1))]
)
def test_a_chunk_out_of_place_is_refused(frame: Frame) -> None:
    with pytest.raises(FrameError, match="chunk"):
        Mailbox().put(1, frame)
