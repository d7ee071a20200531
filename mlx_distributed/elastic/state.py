"""What the coordinator knows, and what follows from it. Pure: no clock, no input, no output."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from mlx_distributed.elastic.protocol import START, Epoch, EpochId, Facts, Hello, Outcome, Seat, Standing, WorkerId

HEARTBEAT_S = 0.5
"""Between two standings of a worker that has no news."""
SILENCE_S = 3.0
"""No worker is given up for silence before. A stop of 2 s just before a heartbeat is due makes a silence of 2.5 s."""
FRESH_S = 2 * HEARTBEAT_S
"""A newcomer that has not been heard for longer is not let in."""
TOGETHER_S = 10.0
APART_S = 6.0
"""Two that are well and wait for each other for so long do not reach each other. A frame of 1 MiB takes as long at
1.4 Mbit/s."""
BARRED_S, MAX_BARRED_S = 60.0, 3840.0
"""A worker that was left out because another one does not reach it may come back after that; each time it takes twice
as long, as each time the others lose some seconds."""
RETURN_S = 120.0
"""A worker that was given up for silence may be cut off. Where the run ends before so much time has passed, the
coordinator stays for the rest of it, to tell that worker."""
MAX_LOSSES = 2
"""So many times within one step a collective may fail between two workers that both are alive."""
MAX_DISAGREEMENTS = 2
"""So many times within one step the digests may differ with no majority."""
PROBE_AGAIN_S = 0.05
"""A worker whose stream has ended is probed at this interval: its ports are closed one after the other when it dies."""
AWAY_S = 1.0
"""If so long nothing has happened, not even a tick, the coordinator itself was stopped, and judges nobody by it."""
NUM_STEP_TIMES = 32
"""Steps that the patience with a silent worker is learnt from."""


@dataclass(frozen=True)
class Rules:
    """What a run demands."""

    facts: Facts
    num_steps: int
    min_workers: int = 1
    """Fewer do not train, but wait."""
    wait_s: float = 600.0
    """So long they wait before they give up."""
    vote_s: float = 300.0
    """A worker that is alive, but has no result for so long after another one has it, is out."""
    share: Literal["even", "speed"] = "speed"
    """How the micro-batches of a step are shared."""
    first_workers: int = 1
    """The first epoch waits for so many, for `TOGETHER_S`: those that were started together begin together."""


@dataclass(frozen=True)
class Member:
    """A worker that is with us: in the epoch, or on its way into one."""

    worker: WorkerId
    address: str
    standing: Standing
    heard_s: float
    connected: bool
    probing: bool = False
    """Whether anybody answers at its address is being found out."""
    probed_s: float | None = None
    """When that began last in the present epoch."""

    @property
    def alive(self) -> bool:
        """It was heard after somebody had lost the connection to it."""
        return not self.probing and self.probed_s is not None and self.heard_s > self.probed_s


Names = tuple[str, str]
"""Of two members of the epoch, the lower rank first; of one that cannot go on, twice the same."""


class Bar(NamedTuple):
    """A worker is not let in."""

    until_s: float
    length_s: float


@dataclass(frozen=True)
class State:
    """All that the coordinator knows. `now_s` of every call is of the monotonic clock of its process."""

    rules: Rules
    term: int
    sequence: int = 0
    """Of the newest epoch in this term."""
    committed: Outcome = START
    """The last step taken. The data cursor is its number, and moves with it alone."""
    epoch: Epoch | None = None
    broken: str | None = None
    """Why the epoch cannot go on as it is; None while it can."""
    members: Mapping[str, Member] = field(default_factory=dict)
    """By name."""
    distrusted: frozenset[str] = frozenset()
    """Incarnations that had another gradient than the majority, until they have fetched the state."""
    barred: Mapping[str, Bar] = field(default_factory=dict)
    """By name; kept when it is over."""
    given_up_s: Mapping[str, float] = field(default_factory=dict)
    """When a worker was given up for silence, by name, until one of that name comes."""
    losses: Mapping[Names, int] = field(default_factory=dict)
    """How often the collective has failed in this step between two workers that are alive."""
    apart_since_s: Mapping[Names, float] = field(default_factory=dict)
    """Since when two workers that are `apart` have been so."""
    num_stalls: int = 0
    """How often in this step workers that are alive have waited for each other in vain."""
    disagreements: int = 0
    """How often the digests of this step differed with no majority."""
    step_times_s: tuple[float, ...] = ()
    now_s: float = 0.0
    """Of the last event."""
    begun_s: float = 0.0
    """When the last step was taken, or the epoch formed."""
    voted_s: float | None = None
    """When the first vote on this step came in this epoch."""
    waiting_since_s: float | None = None
    waiting: str = ""
    """What training waits for."""
    ended: str | None = None
    """Why the run is over."""

    def at(self, now_s: float) -> State:
        """As it is later. The time in which the coordinator was stopped itself (a lid shut) is nobody's silence."""
        away_s = now_s - self.now_s
        if away_s < AWAY_S:
            return replace(self, now_s=now_s)
        members = {name: replace(member, heard_s=member.heard_s + away_s) for name, member in self.members.items()}
        apart_since_s = {pair: since_s + away_s for pair, since_s in self.apart_since_s.items()}
        voted_s = None if self.voted_s is None else self.voted_s + away_s
        begun_s = self.begun_s + away_s
        return replace(
            self, now_s=now_s, members=members, apart_since_s=apart_since_s, begun_s=begun_s, voted_s=voted_s
        )

    @property
    def finished(self) -> bool:
        """All steps are taken."""
        return self.committed.step >= self.rules.num_steps

    def giving_up(self, name: str) -> State:
        """With a worker given up for silence."""
        return replace(self, given_up_s={**self.given_up_s, name: self.now_s})

    def hearing_of(self, name: str) -> State:
        """With a worker of this name here."""
        return replace(self, given_up_s={other: at_s for other, at_s in self.given_up_s.items() if other != name})

    def cut_off(self) -> list[str]:
        """Names of those that may yet come back to hear that the run is over."""
        return [name for name, given_up_s in self.given_up_s.items() if self.now_s - given_up_s < RETURN_S]

    def result(self) -> str:
        """What has become of a run that is finished, for a worker that was not there at the end."""
        leader = self.epoch.seats[0].worker.name if self.epoch and self.epoch.seats else None
        return "all steps are taken" + (f", and the model is in the output folder of worker {leader}" if leader else "")

    def min_workers(self, now_s: float) -> int:
        """That an epoch must have now."""
        at_start = self.epoch is None and not self.committed.step and now_s - self.begun_s < TOGETHER_S
        return max(self.rules.min_workers, self.rules.first_workers if at_start else 1, 1)

    def member(self, worker: WorkerId) -> Member | None:
        """The member that is this very process."""
        member = self.members.get(worker.name)
        return member if member is not None and member.worker == worker else None

    def seated(self) -> list[Member]:
        """Members of the epoch that are still with us, by rank."""
        return self._seated

    @cached_property
    def _seated(self) -> list[Member]:
        seats = self.epoch.seats if self.epoch else ()
        return [member for seat in seats if (member := self.member(seat.worker))]

    def in_epoch(self, worker: WorkerId) -> bool:
        return self.epoch is not None and any(seat.worker == worker for seat in self.epoch.seats)

    def vote(self, member: Member) -> Outcome | None:
        """What a member has prepared in this epoch for the step after the last one taken."""
        standing, epoch = member.standing, self.epoch
        if epoch is None or standing.epoch != epoch.id or standing.prepared is None:
            return None
        return standing.prepared if standing.prepared.step == self.committed.step + 1 else None

    def holds(self, member: Member) -> bool:
        """Whether a member has the state of the last step taken, or has it as soon as it is told to swap."""
        return self.committed in (member.standing.committed, member.standing.prepared)

    def in_doubt(self) -> list[Member]:
        """Members of the epoch that may be gone: they come back, or are given up."""
        return [member for member in self.seated() if not member.connected or member.probing]

    def ready(self, now_s: float) -> list[Member]:
        """Who can take the next step: members of the epoch by rank, then newcomers by name."""
        seated = self.seated()
        newcomers = [
            member
            for name, member in sorted(self.members.items())
            if not self.in_epoch(member.worker)
            and (name not in self.barred or self.barred[name].until_s <= now_s)
            and now_s - member.heard_s <= FRESH_S
        ]
        return [member for member in seated + newcomers if member.connected and self.holds(member)]

    def patience_s(self) -> float:
        """How long a silent worker is waited for: a slow Mac is not a dead Mac."""
        if len(self.step_times_s) < 5:
            return SILENCE_S
        median = statistics.median(self.step_times_s)
        spread = statistics.median(abs(time_s - median) for time_s in self.step_times_s)
        return max(SILENCE_S, median + 5 * spread)

    def waited_for(self) -> set[str]:
        """Names of the members that others cannot go on without."""
        seated = self.seated()
        # Nobody of the epoch is here, but others are, or an epoch is due: those in doubt are in the way.
        stuck = self.broken is not None or not any(member.connected for member in seated)
        names = {member.worker.name for member in self.in_doubt()} if stuck else set()
        voted = [member for member in seated if self.vote(member)]
        if voted:
            names |= {member.worker.name for member in seated} - {member.worker.name for member in voted}
        for member in seated:
            if self.is_current(member):
                names |= set(member.standing.waiting_for)
                names |= {member.standing.lost.name} if member.standing.lost else set()
        return names

    def refusal(self, event: Hello) -> str | None:
        """Why a worker is not let in, for the person at that worker."""
        worker, rules = event.worker, self.rules
        for name, theirs, ours in zip(
            ("run", "program version", "configuration"), event.facts, rules.facts, strict=True
        ):
            if theirs != ours:
                return (
                    f"{worker.name} has {name} {theirs[:16]}, and this run has {ours[:16]}: all workers of a run need "
                    "the same, or they would not make the same weights; join with the join string of this run and "
                    "the version of mlx-distributed that it was started with"
                )
        epoch = event.standing.epoch
        if epoch is not None and epoch.term > self.term:
            return (
                f"{worker.name} has seen term {epoch.term} of this run, and this coordinator is in term "
                f"{self.term}: there are two coordinators, or this one was started from an old journal; end it, "
                "and start it with the newest journal of the run"
            )
        return None

    def names_by_rank(self, *members: Member) -> Names:
        """Of two members of the epoch."""
        first, second = sorted(members, key=self.seated().index)
        return first.worker.name, second.worker.name

    def apart(self) -> Sequence[Names]:
        """Members one of which waits for the other, which waits for it too or has nothing more to send."""
        current = {member.worker.name: member for member in self.seated() if self.is_current(member)}
        pairs = {
            self.names_by_rank(member, other)
            for name, member in current.items()
            for other in filter(None, map(current.get, member.standing.waiting_for))
            if name in other.standing.waiting_for or self.vote(other)
        }
        return sorted(pairs)

    def barring(self, name: str) -> tuple[State, float]:
        """With a worker not let in for a while; for how long."""
        length_s = min(2 * self.barred[name].length_s, MAX_BARRED_S) if name in self.barred else BARRED_S
        return replace(self, barred={**self.barred, name: Bar(self.now_s + length_s, length_s)}), length_s

    def is_current(self, member: Member) -> bool:
        """Whether what a member says of its collective is about this epoch."""
        return self.epoch is not None and member.standing.epoch == self.epoch.id

    def seats_of(self, members: Sequence[Member]) -> tuple[Seat, ...]:
        """Seats with shares by speed, or even ones. Who has not measured yet counts as the mean."""
        speeds = [member.standing.speed for member in members if member.standing.speed > 0]
        mean = sum(speeds) / len(speeds) if speeds and self.rules.share == "speed" else 1.0
        weights = [(member.standing.speed or mean) if self.rules.share == "speed" else 1.0 for member in members]
        return tuple(
            Seat(member.worker, member.address, float(f"{weight / mean:.3g}"), member.standing.bandwidth)
            for member, weight in zip(members, weights, strict=True)
        )

    def next_epoch(self) -> EpochId:
        return EpochId(self.term, self.sequence + 1)

    def missing(self, now_s: float) -> str:
        """What training waits for, in words; empty while an epoch is at work, or all is done."""
        if self.finished:
            left = "" if self.members else listed(self.cut_off())
            return left and f"all steps are taken; waiting up to {RETURN_S:g} s for {left}, cut off before the end"
        if self.epoch is not None and self.broken is None and self.seated():
            return ""
        if self.in_doubt():
            return f"waiting for {names(self.in_doubt())} to come back"
        ready = self.ready(now_s)
        if self.members and not any(self.holds(member) for member in self.members.values()):
            return (
                f"nobody who is here ({names(list(self.members.values()))}) has the state after step "
                f"{self.committed.step}; waiting for a worker that has it. If there is none any more, start again with "
                "--resume to go on from the last checkpoint"
            )
        return (
            f"{len(ready)} of at least {self.min_workers(now_s)} workers are ready to train "
            f"({names(ready) or 'none'}); waiting for more"
        )


def names(members: Sequence[Member]) -> str:
    """For people: `a, b and c`."""
    return listed(member.worker.name for member in members)


def listed(workers: Iterable[str]) -> str:
    """For people, given their names: `a, b and c`."""
    names = sorted(workers)
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
