"""What may happen to an elastic run, and when: the words of a `FaultScript`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from mlx_distributed.elastic.protocol import Facts
from mlx_distributed.elastic.state import State

COORDINATOR = "coordinator"
"""Its name as a host."""


class Point(Enum):
    """Where a host is in a step."""

    IDLE = auto()
    """Before a step is begun."""
    FORWARD = auto()
    """A micro-batch is computed, and others are not."""
    REDUCING = auto()
    """A quarter of what it sends in the step is out: parts."""
    GATHERING = auto()
    """Three quarters are out, so that results are among them; not in a group of two, where there is but one hop."""
    REDUCED = auto()
    """It has the sums, and has not voted."""
    VOTED = auto()
    """The coordinator has its vote."""
    COMMITTED = auto()
    """It knows that the step is taken, and has not swapped its state."""
    SAVING = auto()
    """It does what follows a step, which others wait for. The step is the one that was taken."""
    SERVING = auto()
    """It is about to send a slice of its state; the step is None."""
    FETCHING = auto()
    """A slice of somebody's state is about to be sent to it; the step is None."""
    WRITING = auto()
    """Of the coordinator: all have voted, and the commit is not in the journal."""
    WRITTEN = auto()
    """Of the coordinator: the commit is in the journal, and nobody knows."""


@dataclass(frozen=True)
class Occasion:
    """A host comes to a point of a step, counted from 1."""

    who: str
    point: Point
    step: int | None = None


@dataclass(frozen=True)
class At(Occasion):
    """When a host comes to a point; of any step, where none is given."""

    def holds(self, occasion: Occasion | None, state: State) -> bool:
        return (
            occasion is not None
            and (self.who, self.point) == (occasion.who, occasion.point)
            and self.step in (None, occasion.step)
        )


@dataclass(frozen=True)
class Together:
    """As soon as an epoch of exactly these workers is formed."""

    names: frozenset[str]

    def holds(self, occasion: Occasion | None, state: State) -> bool:
        formed = state.epoch is not None and state.broken is None
        return formed and {seat.worker.name for seat in state.epoch.seats} == self.names  # type: ignore[union-attr]


@dataclass(frozen=True)
class Taken:
    """As soon as so many steps are taken."""

    step: int

    def holds(self, occasion: Occasion | None, state: State) -> bool:
        return state.committed.step >= self.step


@dataclass(frozen=True)
class Missed:
    """As soon as the coordinator knows that others wait for a worker."""

    who: str

    def holds(self, occasion: Occasion | None, state: State) -> bool:
        return self.who in state.waited_for()


@dataclass(frozen=True)
class Deserted:
    """As soon as all steps are taken, and all workers that the coordinator knows have left."""

    def holds(self, occasion: Occasion | None, state: State) -> bool:
        return state.finished and not state.members


When = At | Together | Taken | Missed | Deserted


def together(*names: str) -> Together:
    return Together(frozenset(names))


@dataclass(frozen=True)
class Fault:
    """Something that happens to a host, when it is its turn, and then only."""

    who: str
    when: When | None = None
    """None: at once, after what stands before it."""


class Kill(Fault):
    """It ends without a word: its connections are reset, and new ones refused."""


class Tear(Fault):
    """The coordinator is killed in the middle of writing a record."""


class Stop(Fault):
    """Nothing is heard of it, though its connections stay, until `Go`: a lid is shut."""


class Hold(Fault):
    """It takes long where it is, and is well, until `Go`."""


class Go(Fault):
    """It goes on."""


class Leave(Fault):
    """It leaves in good order, after the step under way."""


class Corrupt(Fault):
    """A bit of the sums that it has got, or gets next, is turned over."""


class Poison(Fault):
    """The loss that it computes next is not a number."""


@dataclass(frozen=True)
class Start(Fault):
    """A new process: a worker, or the coordinator again."""

    name: str | None = None
    """In the run; None for that of the host."""
    token: str | None = None
    """None for that of the run."""
    facts: Facts | None = None
    """None for those of the run."""


@dataclass(frozen=True)
class Part(Fault):
    """Nothing passes between it and another host, though the connections stay."""

    other: str = ""


@dataclass(frozen=True)
class Join(Fault):
    """Between it and another host everything passes again."""

    other: str = ""


@dataclass(frozen=True)
class Jump(Fault):
    """The clock of the coordinator jumps."""

    seconds: float = 0.0


@dataclass(frozen=True)
class FaultScript:
    """A run, and what happens to it.

    Args:
        workers: that it is started with.
        chains: independent of each other; in each, a fault waits for its time only when the one before has happened.
    """

    workers: Sequence[str]
    chains: Sequence[Sequence[Fault]] = ()
