"""A coordinator to try the rules on: events go in, and what it does comes out."""

from __future__ import annotations

from dataclasses import replace

from mlx_distributed.elastic.protocol import (
    START,
    Action,
    Append,
    Epoch,
    EpochId,
    Event,
    Evicted,
    Facts,
    Hello,
    Message,
    Outcome,
    Record,
    Report,
    Send,
    Standing,
    Tick,
    WorkerId,
)
from mlx_distributed.elastic.replay import started
from mlx_distributed.elastic.state import Rules, State
from mlx_distributed.elastic.transition import transition

FACTS = Facts("run", "0.1.0", "config")
RULES = Rules(FACTS, num_steps=100)
FIRST = EpochId(1, 1)


def worker(name: str, incarnation: str = "1") -> WorkerId:
    return WorkerId(name, f"{name}-{incarnation}")


class Desk:
    """A coordinator, its clock, and what it has done at the last event."""

    def __init__(self, rules: Rules = RULES, records: tuple[Record, ...] = (), now_s: float = 1000.0) -> None:
        self.now_s, self.serial = now_s, 0
        self.state: State
        self.state, self.actions = started(rules, records, now_s)
        self.journal = [*records, *self.appended()]

    def happen(self, event: Event, after_s: float = 0.0) -> tuple[Action, ...]:
        self.now_s += after_s
        self.state, self.actions = transition(self.state, event, self.now_s)
        self.journal += self.appended()
        return self.actions

    def wait(self, seconds: float, *heartbeats: str) -> None:
        """Time passes; `heartbeats` repeat where they stand, the others are silent."""
        actions: list[Action] = []
        for _ in range(round(seconds / 0.1)):
            actions += self.happen(Tick(), after_s=0.1)
            for name in heartbeats:
                self.serial += 1
                standing = replace(self.state.members[name].standing, serial=self.serial)
                actions += self.happen(Report(worker(name), standing))
        self.actions = tuple(actions)

    def stand(self, committed: Outcome = START, **rest: object) -> Standing:
        self.serial += 1
        return replace(Standing(self.serial, committed), **rest)

    def hello(self, name: str, committed: Outcome | None = None, incarnation: str = "1", **rest: object) -> None:
        standing = self.stand(self.state.committed if committed is None else committed, **rest)
        self.happen(Hello(worker(name, incarnation), f"{name}:1", FACTS, standing))

    def report(self, name: str, committed: Outcome | None = None, **rest: object) -> None:
        self.happen(Report(worker(name), self.stand(self.state.committed if committed is None else committed, **rest)))

    def enter(self, *names: str) -> None:
        """All say hello and enter an epoch together."""
        for name in names:
            self.hello(name)
        self.confirm()

    def beat(self, name: str) -> None:
        """A heartbeat, a little later."""
        self.wait(0.1, name)

    def confirm(self) -> None:
        """All members of the epoch have heard of it, and are at work."""
        for seat in self.epoch.seats:
            self.report(seat.worker.name, epoch=self.epoch.id)

    def vote(self, name: str, digest: str = "d") -> None:
        self.report(name, epoch=self.epoch.id, prepared=Outcome(self.state.committed.step + 1, digest))

    @property
    def epoch(self) -> Epoch:
        assert self.state.epoch is not None
        return self.state.epoch

    @property
    def names(self) -> list[str]:
        return [seat.worker.name for seat in self.epoch.seats]

    def appended(self) -> list[Record]:
        return [action.record for action in self.actions if isinstance(action, Append)]

    def sent(self, name: str) -> list[Message]:
        return [action.message for action in self.actions if isinstance(action, Send) and action.worker.name == name]

    def evicted(self) -> dict[str, str]:
        return {
            action.worker.name: action.message.reason
            for action in self.actions
            if isinstance(action, Send) and isinstance(action.message, Evicted)
        }
