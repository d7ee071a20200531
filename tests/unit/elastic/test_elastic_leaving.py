"""A worker that is asked to end does so at once, whoever else is there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from test_elastic_grpc import FACTS, PATIENCE_S, RULES, SECRET, running

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.elastic.loop import run_elastic
from mlx_distributed.elastic.membership import LEAVE_S, Membership
from mlx_distributed.elastic.protocol import EpochId, Fetch, Outcome, WorkerId
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import TrainingError


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
    def abandoned(self, away_s: float) -> TrainingError:
        return TrainingError("the coordinator is gone for good")

    def missed(self, result: str) -> None: ...


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
        run_elastic(Ends(), member, lambda epoch, rank, size: GrpcComm(rank, size, SECRET, epoch.sequence), 60.0, 60.0)
        member.close("it was asked to end")
        assert time.monotonic() - begun_s < 2 * LEAVE_S + 1.0
        assert (member.view.committed.step, member.view.epoch) == (2, None)
        assert member.view.prepared == Outcome(3, "d2")


def test_who_was_away_at_the_end_with_the_last_step_prepared_ends_with_it(tmp_path: Path) -> None:
    """No epoch follows in which it could do what follows the step: the others have done that."""
    asleep, awake = threading.Event(), threading.Event()

    class Sleeps(Steps):
        num_steps = 1

        def settle(self) -> None:
            members["a"].leave("its machine goes to sleep")
            asleep.set()
            while not run.coordinator.state.finished:
                pass
            members["a"].come_back()

    class Stays(Steps):
        num_steps = 1

        def reduce(self, leaves: Sequence[int], comm: Communicator) -> str:
            assert asleep.wait(PATIENCE_S)
            return super().reduce(leaves, comm)

        def taken(self, info: None, group: Communicator) -> None:
            assert not self.step or awake.wait(PATIENCE_S)

    def train(name: str, steps: Steps) -> int:
        run_elastic(steps, members[name], lambda *of: group(ends[name], *of), 60.0, 60.0)
        awake.set()
        members[name].close("its work is done")
        return steps.step

    def group(end: Endpoint, epoch: EpochId, rank: int, size: int) -> GrpcComm:
        return GrpcComm(rank, size, SECRET, epoch.sequence, PATIENCE_S, endpoint=end)

    rules, ends = replace(RULES, num_steps=1, first_workers=2), {name: Endpoint() for name in "ab"}
    with running(tmp_path / "journal", rules) as run, ThreadPoolExecutor() as pool:
        members = {
            name: Membership(run.address, SECRET, FACTS, View(WorkerId(name, "1")), end.address)
            for name, end in ends.items()
        }
        for trained in [pool.submit(train, "a", Sleeps()), pool.submit(train, "b", Stays())]:
            assert trained.result(PATIENCE_S) == 1
        assert not run.end.result(PATIENCE_S).failed
    for end in ends.values():
        end.close()


def test_a_coordinator_that_does_not_come_back_is_not_waited_for_for_ever() -> None:
    told: list[str] = []

    class Waits(Steps):
        def alone(self) -> None:
            told.append("alone")

    member = Membership("127.0.0.1:1", SECRET, FACTS, View(WorkerId("a", "1")), "127.0.0.1:1")
    begun_s = time.monotonic()
    with pytest.raises(TrainingError, match="gone for good"):
        run_elastic(Waits(), member, lambda *of: pytest.fail("there is no epoch"), 0.3, 0.4)
    assert 0.7 <= time.monotonic() - begun_s < 3.0
    assert told == ["alone"]
    member.close("nobody is there")
