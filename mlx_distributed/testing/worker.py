"""A worker of `play`: a thread that takes part in an elastic run, and says where it is in a step."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc.aio
import mlx.core as mx

from mlx_distributed.cli.elastic.transfer import snapshot_of, sums_layout, take, views
from mlx_distributed.comm.base import Communicator, Parts, Pending
from mlx_distributed.comm.buckets import Arrays, BucketLayout
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.data.batch import Batch
from mlx_distributed.elastic.loop import run_elastic
from mlx_distributed.elastic.membership import Membership
from mlx_distributed.elastic.protocol import START, EpochId, Facts, Fetch, Outcome, WorkerId
from mlx_distributed.elastic.recovery import NotReceived, fetch_state
from mlx_distributed.elastic.snapshots import METHOD, StateServer
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import TrainingError
from mlx_distributed.testing.faults import Occasion, Point
from mlx_distributed.testing.network import Host, Network
from mlx_distributed.train import attempts
from mlx_distributed.train.attempt import quick_digest
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

T = TypeVar("T")
Make = Callable[[], tuple[Phases, TrainState]]

GROUP_TIMEOUT_S = 300.0
GRACE_S = WAIT_S = 600.0
FLOAT_BYTES = 4
MIN_SLICE_BYTES = 4096
"""Messages of state that are shorter are not slices."""


class Workplace(Protocol):
    """What a worker has around it."""

    network: Network
    workers: dict[str, Worker]

    def reach(self, occasion: Occasion | None) -> None:
        """Somebody is somewhere: what is due then happens before this returns."""

    def pause(self, worker: Worker) -> None:
        """Returns when a worker may go on, or is dead."""

    def await_vote(self, worker: Worker) -> None:
        """Returns when the coordinator knows how a worker votes."""

    def ended(self, worker: Worker) -> None:
        """A worker has ended."""


class Dead(BaseException):
    """This worker was killed."""


class Worker:
    """One process, in a thread of its own.

    Args:
        host: its name in the network.
        name: in the run.
        place: around it.
        make: as of `play`.
    """

    def __init__(self, host: str, name: str, place: Workplace, make: Make) -> None:
        self.host, self.name, self._place, self._make = Host(host), name, place, make
        self.held = self.leaves = self.corrupt = self.poisoned = self.fetching = self.done = False
        self.step = 0
        """Steps taken."""
        self.error: TrainingError | None = None
        self.result: Mapping[str, object] | None = None
        """Digests and counters of the state at the end of the run."""
        self.missed: str | None = None
        """What it was told of an end at which it was not there."""
        self.view: View | None = None

    def begin(self, coordinator: str, token: str, facts: Facts, secret: str) -> None:
        """Start.

        Args:
            coordinator: its address.
            token: that is shown to it.
            facts: of this worker's run.
            secret: of the groups and of the state.
        """
        self.thread = threading.Thread(target=self._be, args=(coordinator, token, facts, secret), name=self.host.name)
        self.thread.start()

    def reach(self, point: Point, step: int | None = None) -> None:
        """This worker is at a point; may be called in any thread of it. Only its own waits there."""
        self._place.reach(Occasion(self.host.name, point, step))
        if threading.current_thread() is self.thread:
            self._place.pause(self)
            if self.host.dead:
                raise Dead

    def ways(self, addresses: Iterable[str]) -> list[str]:
        """To the hosts at these addresses."""
        network = self._place.network
        return [network.way(self.host, network.host_at(address)) for address in addresses]

    def await_vote(self) -> None:
        self._place.await_vote(self)

    async def _serve(self, server: StateServer, data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Answer a request for state."""
        async for message in server.handlers[METHOD](data, context):
            if len(message) >= MIN_SLICE_BYTES:
                for other in list(self._place.workers.values()):
                    if other.fetching:
                        other.reach(Point.FETCHING)
                self.reach(Point.SERVING)
            yield message

    def _be(self, coordinator: str, token: str, facts: Facts, secret: str) -> None:
        server = StateServer(secret)
        endpoint = Endpoint(handlers={METHOD: partial(self._serve, server)})
        self.host.address = endpoint.address
        phases, state = self._make()
        run = _Run(self, phases, state, endpoint, server, secret)
        view = View(WorkerId(self.name, uuid.uuid4().hex), committed=START)
        member = _Membership(coordinator, token, facts, view, self._place.network.way(None, self.host))
        member.worker = self
        self.member = member

        def form(epoch: EpochId, rank: int, size: int) -> GrpcComm:
            group = _Group(rank, size, secret, epoch.term << 32 | epoch.sequence, GROUP_TIMEOUT_S, endpoint=endpoint)
            group.worker = self
            return group

        try:
            run_elastic(run, member, form, GRACE_S, WAIT_S)
            if run.step == run.num_steps:
                counters = {"num_tokens": state.num_tokens, "num_skipped": state.num_skipped}
                self.result = {**state.digest(), **counters}
        except TrainingError as error:
            self.error = error
        except Dead:
            pass
        finally:
            self.view = member.view
            member.close("its work is done")
            endpoint.close()
            self.done = True
            self._place.ended(self)


class _Membership(Membership):
    """Whose worker may be killed."""

    worker: Worker

    def wait(self, condition: Callable[[View], T | None], timeout_s: float | None = None) -> T | None:
        found = super().wait(condition, timeout_s)
        self.worker.view = self.view
        if self.worker.host.dead and threading.current_thread() is self.worker.thread:
            raise Dead
        return found


class _Run:
    """What it trains; as that of a real worker, but without a folder."""

    def __init__(
        self, worker: Worker, phases: Phases, state: TrainState, endpoint: Endpoint, server: StateServer, secret: str
    ) -> None:
        self.worker, self.state = worker, state
        self.phases = _Phases(phases.config, phases.plan, phases.rows, phases.stop_requested)
        self.phases.worker = worker
        self._endpoint, self._server, self._secret = endpoint, server, secret
        self._outcome = START
        self.num_steps = phases.plan.num_steps
        server.publish(snapshot_of(state, START))

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def leaving(self) -> bool:
        return self.worker.leaves

    leaving_others = leaving

    def enter(self, group: Communicator, members: Sequence[str]) -> None:
        attempts.enter(self.phases, self.state, group)

    def attempt(self) -> _Attempt:
        self.worker.reach(Point.IDLE, self.step + 1)
        return _Attempt(self)

    def commit(self, attempt: _Attempt) -> StepInfo:
        self.worker.reach(Point.COMMITTED, self.step + 1)
        sums = views(attempt.of.sums) if self._server.release() else None
        info = attempt.of.commit()
        self._publish(Outcome(self.step, attempt.of.digest), sums)
        return info

    def fetch(self, offer: Fetch) -> Outcome | None:
        layout = partial(sums_layout, self.phases, self.state)
        mine = snapshot_of(self.state, self._outcome)
        sources = self.worker.ways(offer.sources)
        self.worker.fetching = True
        try:
            received = fetch_state(self._endpoint, sources, offer.outcome, mine, layout, self._secret)
        except NotReceived:
            return None
        finally:
            self.worker.fetching = False
        self._publish(take(self.phases, self.state, self._outcome, received), None)
        return self._outcome

    def taken(self, info: StepInfo | None, group: Communicator) -> None:
        self.worker.reach(Point.SAVING, self.step)
        group.barrier("what follows a step")

    def alone(self) -> None:
        pass

    def abandoned(self, away_s: float) -> TrainingError:
        return TrainingError(f"no coordinator for {away_s:.0f} s")

    def missed(self, result: str) -> None:
        self.worker.missed = result

    def _publish(self, outcome: Outcome, sums: dict[str, Any] | None) -> None:
        self.worker.step, self._outcome = self.step, outcome
        self._server.publish(snapshot_of(self.state, outcome), sums)


class _Attempt:
    """A step, and where this worker is in it."""

    def __init__(self, run: _Run) -> None:
        self.of, self._step, self._worker = attempts.begin(run.phases, run.state), run.step + 1, run.worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def reduce(self, leaves: Sequence[int], comm: Communicator) -> str:
        digest = self.of.reduce(leaves, comm)
        self._worker.reach(Point.REDUCED, self._step)
        if self._worker.corrupt:
            self._worker.corrupt = False
            name = next(iter(self.of.sums))
            self.of.sums[name] = self.of.sums[name] * (1 + 2**-22)
            digest = self.of.digest = quick_digest(self.of.sums)
        return digest

    def settle(self) -> None:
        self._worker.await_vote()
        self._worker.reach(Point.VOTED, self._step)
        self.of.settle()


class _Phases(Phases):
    """Whose losses may be poisoned."""

    worker: Worker

    def gradients(
        self, state: TrainState, batch: Batch, step: int, index: int, part: int = 0
    ) -> tuple[mx.array, Arrays]:
        loss, gradients = super().gradients(state, batch, step, index, part)
        if self.worker.poisoned:
            self.worker.poisoned = False
            loss = loss * float("nan")
        return loss, gradients


class _Group(GrpcComm):
    worker: Worker

    def connect(self, addresses: Sequence[str]) -> None:
        ways = self.worker.ways(addresses[self.rank + 1 :])  # The others dial this one.
        super().connect([*addresses[: self.rank + 1], *ways])

    def check(self, what: str) -> None:
        self.worker.reach(Point.FORWARD, self.worker.step + 1)
        super().check(what)

    def start_all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> Pending:
        num_bytes = sum(bucket.size for bucket in layout) * FLOAT_BYTES
        num_bytes = num_bytes * 2 * (self.size - 1) // self.size if self.size > 2 else num_bytes
        host, step = self.worker.host, self.worker.step + 1
        host.alarms = deque(
            (host.sent_bytes + num_bytes * quarters // 4, partial(self.worker.reach, point, step))
            for quarters, point in ((1, Point.REDUCING), (3, Point.GATHERING))
        )
        return super().start_all_reduce(layout, num_leaves, buckets, what, feedback)
