"""`play`: an elastic run in one process, to which happens what a `FaultScript` says.

Coordinator and journal, endpoints, memberships, groups, transfers of state and the loop are those of a real run; each
worker is a thread, and all that they send to each other goes over a `Network`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlx_distributed.elastic.coordinator import Coordinator
from mlx_distributed.elastic.journal import Journal, encode, parse
from mlx_distributed.elastic.protocol import CommitRecord, EpochRecord, Event, Facts, Record
from mlx_distributed.elastic.state import Rules
from mlx_distributed.testing.faults import (
    COORDINATOR,
    At,
    Corrupt,
    Fault,
    FaultScript,
    Go,
    Hold,
    Join,
    Jump,
    Kill,
    Leave,
    Occasion,
    Part,
    Point,
    Poison,
    Start,
    Stop,
    Tear,
)
from mlx_distributed.testing.network import Host, Network
from mlx_distributed.testing.worker import Make, Worker, Workplace

T = TypeVar("T")

TOKEN = "secret-of-a-test"
FACTS = Facts("run-of-a-test", "0.0.0", "configuration")


@dataclass(frozen=True)
class Played:
    """What came of a run."""

    records: list[Record]
    """Of the journal."""
    states: Mapping[str, Mapping[str, object]]
    """Digests and counters of the workers that have come to the end, by host."""
    errors: Mapping[str, str]
    """Of those that were not let in or could not go on."""
    missed: Mapping[str, str]
    """What those were told, by host, that the others had come to the end without."""

    @property
    def commits(self) -> list[int]:
        """Steps that were taken, in order."""
        return [record.outcome.step for record in self.records if isinstance(record, CommitRecord)]

    @property
    def epochs(self) -> list[str]:
        """Names of the members of each epoch, in rank order."""
        epochs = [record.epoch for record in self.records if isinstance(record, EpochRecord)]
        return [" ".join(seat.worker.name for seat in epoch.seats) for epoch in epochs]


def play(script: FaultScript, make: Make, journal: Path, limit_s: float = 30.0, **rules: object) -> Played:
    """Run to the end.

    Args:
        script: what happens.
        make: a worker's own phases and state, as they are before the first step; called in its thread.
        journal: file of the coordinator.
        limit_s: the run may take so long.
        rules: further ones than those that follow from the script.

    Raises:
        AssertionError: a fault never came to its turn, or the run did not end.
    """
    stage = _Stage(script, make, journal, rules)
    try:
        stage.run(time.monotonic() + limit_s)
    finally:
        stage.close()
    records, _ = parse(journal.read_bytes(), str(journal))
    workers = stage.workers
    return Played(
        records,
        {host: worker.result for host, worker in workers.items() if worker.result is not None},
        {host: str(worker.error) for host, worker in workers.items() if worker.error is not None},
        {host: worker.missed for host, worker in workers.items() if worker.missed is not None},
    )


@dataclass
class _Office:
    """The coordinator and its host."""

    host: Host
    torn: bool = False
    late_s: float = 0.0
    """By which its clock has jumped."""
    now: Coordinator | None = None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)


class _Stage(Workplace):
    """All of it. What a fault does to the network it does at once; processes are started by the thread of `run`."""

    def __init__(self, script: FaultScript, make: Make, path: Path, rules: Mapping[str, object]) -> None:
        self._left = [list(chain) for chain in script.chains if chain]
        self._make, self._path = make, path
        num_steps = make()[0].plan.num_steps
        first = {"num_steps": num_steps, "first_workers": len(script.workers), "share": "even"}
        self._rules = Rules(FACTS, **{**first, **rules})  # type: ignore[arg-type]
        self.network = Network()
        self.workers: dict[str, Worker] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._todo: queue.SimpleQueue[Start | str | None] = queue.SimpleQueue()
        """What is to be started, why the script makes no sense, or, with None, that a worker has ended."""
        self._office = _Office(Host(COORDINATOR, comes_back=True))
        self._journal: _Journal | None = None
        self._thread = threading.Thread(target=self._office.loop.run_forever, name=COORDINATOR, daemon=True)
        self._thread.start()
        self._start(Start(COORDINATOR))
        for name in script.workers:
            self._start(Start(name))

    def run(self, limit_s: float) -> None:
        """Until all workers that can have ended."""
        self.reach(None)
        while self._living() or self._left or not self._todo.empty():
            try:
                start = self._todo.get(timeout=max(limit_s - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(self._report()) from None
            if isinstance(start, str):
                raise AssertionError(start)
            if start is not None:
                self._start(start)
            elif not self._living() and self._left:
                raise AssertionError(f"all have ended, and it has not come to: {self._report()}")

    def close(self) -> None:
        for worker in self.workers.values():
            self.network.kill(worker.host)
            worker.host.stopped = False
        with self._lock:
            self._changed.notify_all()
        for worker in self.workers.values():
            worker.thread.join()
        self._retire()
        self._office.loop.call_soon_threadsafe(self._office.loop.stop)
        self._thread.join()
        self._office.loop.close()
        self.network.close()

    # Called by the hosts, each in any of its threads.

    def reach(self, occasion: Occasion | None) -> None:
        with self._lock:
            happened = True
            while happened and self._office.now is not None:
                happened = False
                for chain in self._left:
                    if chain[0].when is None or chain[0].when.holds(occasion, self._office.now.state):
                        happened = True
                        if isinstance(chain[0].when, At):
                            occasion = None  # Of the faults that wait for it, one has its turn.
                        self._happen(chain.pop(0))
                self._left = [chain for chain in self._left if chain]
                if happened:
                    self._changed.notify_all()

    def pause(self, worker: Worker) -> None:
        with self._lock:
            self._changed.wait_for(lambda: worker.host.dead or not (worker.held or worker.host.stopped))

    def await_vote(self, worker: Worker) -> None:
        def heard() -> bool:
            coordinator, view = self._office.now, worker.member.view
            if worker.host.dead or view.prepared is None or coordinator is None or self._office.host.dead:
                return True
            member = coordinator.state.members.get(worker.name)
            return member is None or member.standing.prepared == view.prepared

        with self._lock:
            self._changed.wait_for(heard)

    def ended(self, worker: Worker) -> None:
        self.network.kill(worker.host)
        self._todo.put(None)

    # Faults, with the lock.

    def _happen(self, fault: Fault) -> None:
        if isinstance(fault, Start):
            self._todo.put(fault)
            return
        named = [fault.who, fault.other] if isinstance(fault, Part | Join) else [fault.who]
        if not {COORDINATOR, *self.workers}.issuperset(named):
            self._todo.put(f"nobody is called so: {fault}")
            return
        worker, host = self.workers.get(fault.who), self._host(fault.who)
        match fault:
            case Kill() | Tear():
                self._office.torn = isinstance(fault, Tear)
                self.network.kill(host)
            case Stop():
                self.network.stop(host, True)
            case Go():
                self.network.stop(host, False)
            case Part() | Join():
                self.network.part(host, self._host(fault.other), isinstance(fault, Part))
            case Jump():
                self._office.late_s += fault.seconds
        if worker is not None:
            worker.held = isinstance(fault, Hold) or (worker.held and not isinstance(fault, Go))
            worker.leaves |= isinstance(fault, Leave)
            worker.corrupt |= isinstance(fault, Corrupt)
            worker.poisoned |= isinstance(fault, Poison)

    def _host(self, name: str) -> Host:
        return self._office.host if name == COORDINATOR else self.workers[name].host

    def _living(self) -> list[str]:
        """Workers that will come to an end."""
        return [
            name
            for name, worker in self.workers.items()
            if worker.thread.is_alive() and not worker.done and not (worker.host.dead or worker.host.stopped)
        ]

    # Processes, in the thread of `run`.

    def _start(self, start: Start) -> None:
        if start.who == COORDINATOR:
            self._retire()
            self._journal = _Journal(self._path, self)
            self._office.torn = self._office.host.dead = False
            coordinator = _Coordinator(self._rules, self._journal, TOKEN, clock=self._now_s)
            coordinator.stage = self
            address = self._call(coordinator.start("127.0.0.1:0"))
            with self._lock:
                self._office.now, self._office.host.address = coordinator, address
        else:
            worker = Worker(start.who, start.name or start.who, self, self._make)
            with self._lock:
                self.workers[start.who] = worker
            way = self.network.way(worker.host, self._office.host)
            worker.begin(way, start.token or TOKEN, start.facts or FACTS, TOKEN)

    def _retire(self) -> None:
        if self._office.now is not None and self._journal is not None:
            self._call(self._office.now.stop())
            self._journal.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._office.loop).result()

    def _now_s(self) -> float:
        return time.monotonic() + self._office.late_s

    # Of the coordinator, in its thread.

    def written(self, record: Record, append: Callable[[Record], None], tear: Callable[[bytes], object]) -> None:
        """Write a record, unless the coordinator is killed before."""
        step = record.outcome.step if isinstance(record, CommitRecord) else None
        dead = OSError(0, "the coordinator is dead")
        if step is not None:
            self.reach(Occasion(COORDINATOR, Point.WRITING, step))
        if self._office.host.dead:
            line = encode(record)
            if self._office.torn:
                tear(line[: len(line) // 2])
            raise dead
        append(record)
        if step is not None:
            self.reach(Occasion(COORDINATOR, Point.WRITTEN, step))
        if self._office.host.dead:
            raise dead

    def heard(self) -> None:
        """The coordinator has dealt with an event."""
        self.reach(None)
        with self._lock:
            self._changed.notify_all()

    def _report(self) -> str:
        state = self._office.now.state if self._office.now is not None else None
        views = {name: worker.view for name, worker in self.workers.items()}
        return f"left: {self._left}; coordinator: {state}; workers: {views}"


class _Journal(Journal):
    """One whose coordinator may be killed before, in and after a record."""

    def __init__(self, path: Path, stage: _Stage) -> None:
        super().__init__(path)
        self._stage = stage

    def append(self, record: Record) -> None:
        self._stage.written(record, super().append, self._file.write)


class _Coordinator(Coordinator):
    stage: _Stage

    def _happen(self, event: Event) -> None:
        super()._happen(event)
        self.stage.heard()
