"""A stream to the coordinator ends, and gRPC cancels its call while the coordinator clears up after it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from elastic_desk import FACTS, RULES, worker

from mlx_distributed.elastic.coordinator import Coordinator
from mlx_distributed.elastic.journal import Journal
from mlx_distributed.elastic.messages import TOKEN, arrival_to_pb
from mlx_distributed.elastic.protocol import START, Hello, Standing

SECRET = "a secret"


class BrokenCall:
    """What gRPC gives the coordinator of a call whose stream ends when told to."""

    def __init__(self) -> None:
        hello = Hello(worker("a"), "127.0.0.1:1", FACTS, Standing(1, START))
        self._words = [arrival_to_pb(hello).SerializeToString()]
        self.ends = asyncio.Event()

    def invocation_metadata(self) -> tuple[tuple[str, str]]:
        return ((TOKEN, SECRET),)

    async def send_initial_metadata(self, _: object) -> None:
        pass

    async def write(self, _: bytes) -> None:
        pass

    async def read(self) -> object:
        if self._words:
            return self._words.pop()
        await self.ends.wait()
        return grpc.aio.EOF


@pytest.mark.parametrize("num_turns", range(6))
def test_who_was_there_is_seen_to_be_gone(tmp_path: Path, num_turns: int) -> None:
    async def attend() -> bool:
        journal = Journal(tmp_path / "journal")
        coordinator = Coordinator(RULES, journal, SECRET)
        await coordinator.start("127.0.0.1:0")
        call = BrokenCall()
        task = asyncio.create_task(coordinator._attend(None, call))  # type: ignore[arg-type]
        while not coordinator.state.members:
            await asyncio.sleep(0)
        call.ends.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        member = coordinator.state.member(worker("a"))
        await coordinator.stop()
        journal.close()
        return member is not None and member.connected

    assert not asyncio.run(attend())
