"""A small world for the coordinator: workers that follow the protocol, streams, a journal, and everything that goes
wrong with them, decided by a tape of bytes. No clock, no thread, no socket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from elastic_process import Process, Tape

from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.elastic.assignment import assign
from mlx_distributed.elastic.journal import encode, parse
from mlx_distributed.elastic.protocol import (
    START,
    Append,
    Commit,
    CommitRecord,
    Disconnected,
    EpochId,
    Event,
    Evicted,
    Facts,
    Hello,
    Leave,
    Loss,
    Message,
    Outcome,
    Probe,
    Probed,
    Send,
    Tick,
    WorkerId,
)
from mlx_distributed.elastic.replay import started
from mlx_distributed.elastic.state import Rules, State
from mlx_distributed.elastic.transition import transition
from mlx_distributed.elastic.worker import View

FACTS = Facts("run", "0.1.0", "config")
NUM_LEAVES = 6


class World:
    """All of it."""

    def __init__(self, num_workers: int, tape: Tape, min_workers: int = 1) -> None:
        self.tape, self.now_s = tape, 100.0
        self.rules = Rules(FACTS, num_steps=10**9, min_workers=min_workers, wait_s=1e9)
        self.disk = b""
        self.state: State | None = None
        self.crash_after: int | None = None
        """Actions that the coordinator still does before it dies."""
        self.torn = False
        self.num_incarnations = 0
        self.processes = [self.new_process(f"w{i}") for i in range(num_workers)]
        self.probes: list[tuple[WorkerId, str]] = []
        self.heard: list[Event] = []
        self.told: list[tuple[WorkerId, int, Message]] = []
        self.ledger: dict[int, str] = {}
        """What the journal says, by step."""
        self.holdings: dict[tuple[EpochId, int], dict[str, frozenset[int]]] = {}
        """By epoch and step what each member held when it entered, which all tell each other."""
        self.given: dict[tuple[EpochId, int], dict[str, frozenset[int]]] = {}
        """The micro-batches that a member has put into the sum."""
        self.start_coordinator()

    def new_process(self, name: str) -> Process:
        self.num_incarnations += 1
        return Process(View(WorkerId(name, f"{name}-{self.num_incarnations}")))

    # The coordinator and its disk.

    def start_coordinator(self) -> None:
        records, num_bytes = parse(self.disk, "journal")
        self.disk = self.disk[:num_bytes]
        self.state, actions = started(self.rules, records, self.now_s)
        self.perform(actions)

    def crash_coordinator(self) -> None:
        self.state = None
        self.probes.clear()
        for process in self.processes:
            self.cut(process)

    def happen(self, event: Event) -> None:
        if self.state is None:
            return
        self.state, actions = transition(self.state, event, self.now_s)
        self.perform(actions)

    def perform(self, actions: tuple[object, ...]) -> None:
        term = self.state.term if self.state else 0
        for action in actions:
            if self.crash_after == 0:
                if self.torn and isinstance(action, Append):
                    line = encode(action.record)
                    self.disk += line[: self.tape.draw(len(line))]
                self.crash_after = None
                self.crash_coordinator()
                return
            if self.crash_after is not None:
                self.crash_after -= 1
            match action:
                case Append(record):
                    self.disk += encode(record)
                    if isinstance(record, CommitRecord):
                        step, digest = record.outcome
                        assert step == len(self.ledger) + 1, "I1: a step is committed once, in order"
                        self.ledger[step] = digest
                case Send(worker, message):
                    for process in self.processes:
                        if process.id == worker and process.connected:
                            process.inbox.append((term, message))
                            self.told.append((worker, term, message))
                case Probe(worker, _):
                    self.probes.append((worker, ""))

    # Streams.

    def cut(self, process: Process, num_lost: int = 10**6) -> None:
        """The stream breaks: what the coordinator has not read yet is lost from some point on."""
        if process.connected:
            process.connected = False
            for _ in range(min(num_lost, len(process.outbox))):
                process.outbox.pop()
            process.outbox.append(Disconnected(process.id))
            process.inbox.clear()

    def connect(self, process: Process) -> None:
        if self.state is None or process.connected or process.outbox:
            return
        process.view = replace(process.view, out=None)
        process.connected = True
        process.serial += 1
        standing = process.view.standing(process.serial)
        process.outbox.append(Hello(process.id, f"{process.id.name}:1", FACTS, standing))

    def deliver_event(self, process: Process) -> None:
        if process.outbox and self.state is not None:
            event = process.outbox.popleft()
            self.heard.append(event)
            self.happen(event)

    def deliver_message(self, process: Process) -> None:
        if process.inbox and process.alive and not process.stopped:
            self.receive(process, *process.inbox.popleft())

    def receive(self, process: Process, term: int, message: Message) -> None:
        before = process.view
        view = before.receive(term, message)
        if view == before:
            return
        process.view = view
        if isinstance(message, Commit) and view.committed != before.committed:
            assert self.ledger[view.committed.step] == view.committed.digest, "I3: it is in the journal"
            assert view.committed.step == process.state.step + 1, "no step is passed over"
            process.history.append(view.committed)
        if isinstance(message, Evicted):
            self.cut(process, 0)
        process.say()

    # What workers do.

    def work(self, process: Process) -> None:
        """Go one stage on: fetch state, or exchange holdings, compute and send, receive the sum and vote."""
        if not process.alive or process.stopped:
            return
        view = process.view
        if view.offer is not None:
            sources = [p for p in self.processes if p.alive and p.state == view.offer.outcome and p is not process]
            if sources:
                process.history, process.num_checked = list(sources[0].history), 0
                process.view = view.fetched(view.offer.outcome)
                process.say()
            return
        epoch = view.epoch
        if epoch is None or view.prepared is not None or view.committed != process.state:
            return
        step, names = view.committed.step + 1, [seat.worker.name for seat in epoch.seats]
        if process.held[0] != step:
            process.held = (step, frozenset())
        key, name = (epoch.id, step), process.id.name
        holdings, given = self.holdings.setdefault(key, {}), self.given.setdefault(key, {})
        if name not in holdings:
            holdings[name] = process.held[1]
        elif name not in given and len(holdings) == len(names):
            parts = [tuple(cover_set(holdings[other])) for other in names]
            shares = assign(NUM_LEAVES, parts, [seat.weight for seat in epoch.seats])
            share = shares[names.index(name)]
            computed = {leaf for node in share.compute for leaf in range(*node)}
            kept = {leaf for node in share.keep for leaf in range(*node)}
            assert kept <= process.held[1]
            assert not computed & process.held[1]
            process.held = (step, frozenset(kept | computed))
            given[name] = process.held[1]
        elif len(given) == len(names):
            leaves = sorted(leaf for part in given.values() for leaf in part)
            assert leaves == list(range(NUM_LEAVES)), "every micro-batch is in the sum once"
            # As with a lossy wire, another epoch would give another sum.
            digest = f"{epoch.id.term}.{epoch.id.sequence}.{step}"
            process.view = view.prepare(epoch.id, f"{name}?" if process.corrupt else digest)
            process.corrupt = False
            process.say()

    def kill(self, process: Process) -> None:
        process.alive = False
        if self.state_is_lost and self.tape.draw(8):
            process.alive = True  # Mostly somebody is left who has the state, or all ends too soon.
        else:
            self.cut(process, self.tape.draw(3))

    def restart(self, process: Process) -> None:
        if not process.alive:
            new = self.new_process(process.id.name)
            new.outbox = process.outbox
            self.processes[self.processes.index(process)] = new

    def leave(self, process: Process) -> None:
        if process.alive and process.connected:
            process.alive = False
            if self.state_is_lost:
                process.alive = True
            else:
                process.outbox.append(Leave(process.id, "SIGTERM"))
                self.cut(process, 0)

    def doze(self, process: Process) -> None:
        """It leaves for a while."""
        if process.alive and process.connected:
            process.outbox.append(Leave(process.id, "it sleeps"))
            self.cut(process, 0)
            process.view = process.view.receive(process.view.term, Evicted("it sleeps"))

    def complain(self, process: Process) -> None:
        epoch = process.view.epoch
        if epoch is None or not process.alive:
            return
        name = epoch.seats[self.tape.draw(len(epoch.seats))].worker.name
        if self.tape.draw(2):
            process.view = process.view.suspect(epoch.id, (name,))
        else:
            process.view = process.view.suspect(epoch.id, lost=Loss(name, "reset"))
        process.say()

    def answer_probe(self) -> None:
        if self.probes:
            worker, _ = self.probes.pop(self.tape.draw(len(self.probes)))
            process = next((p for p in self.processes if p.id == worker), None)
            self.happen(Probed(worker, refused=process is None or not process.alive))

    def repeat(self) -> None:
        """The network delivers something again, late or out of order."""
        if self.tape.draw(2) and self.heard:
            event = self.heard[-1 - self.tape.draw(min(len(self.heard), 40))]
            if not isinstance(event, Disconnected | Leave):  # These the shell makes of its own streams.
                self.happen(event)
        elif self.told:
            worker, term, message = self.told[-1 - self.tape.draw(min(len(self.told), 40))]
            for process in self.processes:
                if process.id == worker and process.alive and not process.stopped:
                    self.receive(process, term, message)

    def pass_time(self, seconds: float) -> None:
        for _ in range(math.ceil(seconds / 0.5)):
            self.now_s += 0.5
            self.happen(Tick())

    def crash_soon(self) -> None:
        self.crash_after, self.torn = self.tape.draw(4), bool(self.tape.draw(2))

    def step(self) -> None:
        """One thing happens; the tape says what."""
        process = self.processes[self.tape.draw(len(self.processes))]
        usual: list[Callable[[], None]] = [
            lambda: self.round(self.processes, 1 + self.tape.draw(6)),
            lambda: self.round(self.processes, 1 + self.tape.draw(12)),
            lambda: self.round([process], 1 + self.tape.draw(3)),
            lambda: self.deliver_event(process),
            lambda: self.deliver_message(process),
            lambda: self.work(process),
        ]
        trouble: list[Callable[[], None]] = [
            process.say,
            lambda: self.pass_time(0.4),
            lambda: self.pass_time(3.0),
            lambda: setattr(self, "now_s", self.now_s + 5.0),
            lambda: self.kill(process),
            lambda: self.restart(process),
            lambda: self.cut(process, self.tape.draw(3)),
            lambda: self.connect(process),
            lambda: setattr(process, "stopped", not process.stopped),
            lambda: setattr(process, "corrupt", True),
            lambda: self.complain(process),
            self.answer_probe,
            self.repeat,
            self.crash_soon,
            lambda: self.start_coordinator() if self.state is None else None,
            lambda: self.leave(process),
            lambda: self.doze(process),
        ]
        kind = self.tape.draw(48)
        (trouble[kind] if kind < len(trouble) else usual[kind % len(usual)])()
        self.check()

    def round(self, processes: list[Process], num_times: int) -> None:
        """What goes on by itself where nothing is wrong."""
        for process in processes * num_times:
            if process.alive and not process.stopped:
                self.connect(process)
                self.work(process)
                self.deliver_event(process)
                self.deliver_message(process)

    def check(self) -> None:
        """I1, I2 and I4: every state is made of committed steps, all of them, in their order."""
        for process in self.processes:
            while process.num_checked < len(process.history):
                process.num_checked += 1
                assert process.history[process.num_checked - 1] == (
                    process.num_checked,
                    self.ledger[process.num_checked],
                )
            assert process.view.committed.step <= len(self.ledger)
        if self.state is not None:
            assert self.state.committed.step == len(self.ledger)

    def settle_in(self) -> None:
        """All workers come, one after the other, and take a step."""
        for process in self.processes:
            self.round([process], 4)
        while not self.ledger:
            self.round(self.processes, 1)

    def heal(self) -> bool:
        """Nothing goes wrong any more; whether training goes on then, or has come to an end."""
        self.crash_after = None
        if self.state is None:
            self.start_coordinator()
        for process in list(self.processes):
            process.stopped = process.corrupt = False
            self.restart(process)
        begun = len(self.ledger)
        for _ in range(600):
            for process in self.processes:
                self.connect(process)
                process.say()
                for _ in range(3):
                    self.work(process)
                while process.outbox:
                    self.deliver_event(process)
                while process.inbox:
                    self.deliver_message(process)
                if process.view.out is not None:
                    self.cut(process, 0)
            while self.probes:
                self.answer_probe()
            self.pass_time(0.3)
            self.check()
            if len(self.ledger) > begun or (self.state is not None and self.state.ended is not None):
                return True
        return False

    @property
    def state_is_lost(self) -> bool:
        """No process has the state of the last commit any more, nor has it prepared."""
        last = Outcome(len(self.ledger), self.ledger[len(self.ledger)]) if self.ledger else START
        return not any(last in (p.view.committed, p.view.prepared) for p in self.processes if p.alive)


def cover_set(leaves: frozenset[int]) -> list[tuple[int, int]]:
    """Nodes that hold exactly these leaves, as `TreeSum` would have merged them."""
    nodes: list[tuple[int, int]] = []
    start = None
    for leaf in range(NUM_LEAVES + 1):
        if leaf in leaves and start is None:
            start = leaf
        elif leaf not in leaves and start is not None:
            nodes += cover(start, leaf, NUM_LEAVES)
            start = None
    return nodes
