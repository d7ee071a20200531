"""A worker that is asked to end does so at once, whoever else is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from test_elastic_grpc import FACTS, SECRET, running

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.elastic.loop import run_elastic
from mlx_distributed.elastic.membership import LEAVE_S, Membership
from mlx_distributed.elastic.protocol import Fetch, Outcome, WorkerId
from mlx_distributed.elastic.worker import View


class Steps:
    """A run, and each of its steps, in which nothing is computed."""

    num_steps, step, num_leaves, speed = 9, 0, 1, 0.0
    held: Sequence[tuple[int, int]] = ()
    divisible, leaving, leaving_others = True, False, False

    def enter(self, group: Communicator, members: Sequence[str]) -> None: ...
    def attempt(self) -> Steps:
        return self

    def keep(self, nodes: Collection[tuple[int, int]]) -> None: ...
    def reduce(self, leaves: Sequence[int], comm: Communicator) -> str:
        return f"d{self.step}"

    def settle(self) -> None: ...
    def commit(self, attempt: Steps) -> None:
        self.step += 1

    def fetch(self, offer: Fetch) -> Outcome | None: ...
    def taken(self, info: None, group: Communicator) -> None: ...
    def alone(self) -> None: ...


def test_it_waits_for_no_coordinator(tmp_path: Path) -> None:
    """Its vote has no answer, and it is asked to end meanwhile."""
    with running(tmp_path / "journal") as run:

        class Ends(Steps):
            def settle(self) -> None:
                self.leaving = self.leaving_others = self.step == 2

            def reduce(self, leaves: Sequence[int], comm: Communicator) -> str:
                if self.step == 2:
                    asyncio.run_coroutine_threadsafe(run.coordinator.stop(), run.loop).result()
                return super().reduce(leaves, comm)

        member = Membership(run.address, SECRET, FACTS, View(WorkerId("a", "1")), "127.0.0.1:1")
        begun_s = time.monotonic()
        run_elastic(Ends(), member, lambda epoch, rank, size: GrpcComm(rank, size, SECRET, epoch.sequence), 60.0)
        member.close("it was asked to end")
        assert time.monotonic() - begun_s < 2 * LEAVE_S + 1.0
        assert (member.view.committed.step, member.view.epoch) == (2, None)
        assert member.view.prepared == Outcome(3, "d2")
