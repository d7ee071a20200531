"""The words of elastic training: what the coordinator and the workers tell each other, do, and write down.

A worker does not send single news ("I have voted", "I wait for b") that could be lost: it says where it stands, again
and again, and the coordinator acts on the newest `Standing`. So nothing depends on a message that came once, and after
a restart of the coordinator one round of standings tells it all there is to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class WorkerId(NamedTuple):
    """A worker: its name in the run, and which of the processes that have borne the name it is."""

    name: str
    incarnation: str
    """Drawn anew by every process."""


class EpochId(NamedTuple):
    """Grows with every epoch of a run: the term rises at each start of the coordinator, the sequence within a term."""

    term: int
    sequence: int


class Outcome(NamedTuple):
    """A step, counted from 1, and the digest of its reduced gradient. Who has taken equal steps has equal states."""

    step: int
    digest: str


START = Outcome(0, "")
"""The state before the first step, which every worker can make."""
NOTHING = Outcome(-1, "")
"""No state at all, or none to be trusted."""


class Facts(NamedTuple):
    """What must be the same on all workers, or they would not make the same bits."""

    run_id: str
    program_version: str
    config_digest: str


class Loss(NamedTuple):
    """The collective of an epoch has failed and cannot go on."""

    name: str
    """Of the worker at fault, which may be the one that says so."""
    reason: str


@dataclass(frozen=True)
class Seat:
    """A worker in an epoch."""

    worker: WorkerId
    address: str
    """Where its collective and its state are served, as in 10.0.0.7:4000."""
    weight: float
    """Of its share of the micro-batches."""
    bandwidth: float = 0.0
    """Of its link, in bytes per second; 0 where the members of the epoch are to measure it."""


@dataclass(frozen=True)
class Epoch:
    """A group of workers that takes steps together."""

    id: EpochId
    committed: Outcome
    """The step that all of them have taken last; they go on with the next."""
    seats: tuple[Seat, ...]
    """In rank order."""
    reason: str
    """Why it was formed, for people."""


@dataclass(frozen=True)
class Standing:
    """Where a worker stands."""

    serial: int
    """Grows with every standing of an incarnation; an older one that arrives late is passed over."""
    committed: Outcome
    """What its state is the state of."""
    epoch: EpochId | None = None
    """That it takes part in."""
    prepared: Outcome | None = None
    """Its vote: the reduced gradient of the next step is here, as all of `epoch` have it, and can be swapped in."""
    speed: float = 0.0
    """Micro-batches per second; 0 where it has not measured."""
    waiting_for: tuple[str, ...] = ()
    """Names of those that have been silent in the collective of `epoch` for a while, though something is due."""
    lost: Loss | None = None
    """Why the collective of `epoch` has failed here."""
    bandwidth: float = 0.0
    """Of its link, in bytes per second; 0 where it has not been measured."""
    round_trip_s: float = 0.0
    """To the nearest of the others; likewise."""


# Events: what happens to the coordinator.


@dataclass(frozen=True)
class Hello:
    """A worker has connected: for the first time, again, or to a coordinator that was away."""

    worker: WorkerId
    address: str
    facts: Facts
    standing: Standing


@dataclass(frozen=True)
class Report:
    """A heartbeat, a vote, a suspicion, or the end of a transfer of state: a worker says where it stands."""

    worker: WorkerId
    standing: Standing


@dataclass(frozen=True)
class Disconnected:
    """The stream of a worker has ended without a goodbye."""

    worker: WorkerId


@dataclass(frozen=True)
class Probed:
    """What became of a connection to a worker's address."""

    worker: WorkerId
    refused: bool
    """Nobody listens there. A connection that is made says nothing: a stopped process takes it too."""


@dataclass(frozen=True)
class Leave:
    """A worker leaves in good order: the end of training, a lid that shuts, SIGTERM."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Hello | Report | Disconnected | Probed | Leave | Tick


# Messages: what the coordinator tells a worker. Each carries the term of the coordinator beside.


@dataclass(frozen=True)
class Commit:
    """The step is taken: whoever has prepared it swaps it in."""

    outcome: Outcome
    epoch: EpochId
    weights: tuple[float, ...]
    """Of the shares of the next step, by rank of `epoch`."""


@dataclass(frozen=True)
class Enter:
    """Take part in an epoch. Gradients of the step under way stay good."""

    epoch: Epoch


@dataclass(frozen=True)
class Fetch:
    """Get the state after `outcome` from any of the addresses, then say so."""

    outcome: Outcome
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Evicted:
    """The worker is out; it may say Hello again and comes in like a new one."""

    reason: str
    must_fetch: bool = False
    """Its state is not to be trusted."""


@dataclass(frozen=True)
class Refused:
    """The worker is not let in, and need not try again."""

    reason: str


@dataclass(frozen=True)
class Ended:
    """The run is over."""

    reason: str
    failed: bool


Message = Commit | Enter | Fetch | Evicted | Refused | Ended


# Records: what the coordinator writes down before anybody is told.


@dataclass(frozen=True)
class RunRecord:
    """The first of a journal: whose it is."""

    run_id: str


@dataclass(frozen=True)
class TermRecord:
    """A coordinator has started."""

    term: int


@dataclass(frozen=True)
class EpochRecord:
    """An epoch was formed."""

    epoch: Epoch


@dataclass(frozen=True)
class CommitRecord:
    """A step is taken: from here on it cannot be undone, nor taken again. The data cursor is its number."""

    outcome: Outcome
    weights: tuple[float, ...]


@dataclass(frozen=True)
class RollbackRecord:
    """By the wish of a person the run goes on from an earlier checkpoint: later steps are taken anew."""

    outcome: Outcome


Record = RunRecord | TermRecord | EpochRecord | CommitRecord | RollbackRecord


# Actions: what the shell around the coordinator does, in the order given.


@dataclass(frozen=True)
class Append:
    """Put a record on disk; nothing that follows may be done before it is there."""

    record: Record


@dataclass(frozen=True)
class Send:
    """Tell a worker, where it is connected. After Evicted, Refused and Ended its stream is closed."""

    worker: WorkerId
    message: Message


@dataclass(frozen=True)
class Probe:
    """Find out whether anybody answers there, and give a `Probed`."""

    worker: WorkerId
    address: str


@dataclass(frozen=True)
class WaitFor:
    """Tell people what training waits for; an empty reason: it goes on."""

    reason: str


@dataclass(frozen=True)
class End:
    """The coordinator's work is done."""

    reason: str
    failed: bool


Action = Append | Send | Probe | WaitFor | End
