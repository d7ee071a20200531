"""What a worker knows of the run: a pure value, and what the coordinator's messages make of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_distributed.comm.link_speed import UNKNOWN, LinkSpeed
from mlx_distributed.elastic.protocol import (
    NOTHING,
    START,
    Commit,
    Ended,
    Enter,
    Epoch,
    EpochId,
    Evicted,
    Fetch,
    Loss,
    Message,
    Outcome,
    Refused,
    Standing,
    WorkerId,
)


@dataclass(frozen=True)
class View:
    """A worker's side of the protocol. Changed by messages (`receive`) and by what the worker does."""

    worker: WorkerId
    committed: Outcome = START
    """What its state is the state of, as soon as the step that was prepared is swapped in."""
    term: int = 0
    """The highest heard of: a coordinator of a lower one is not obeyed."""
    newest: EpochId | None = None
    """The newest epoch entered so far."""
    epoch: Epoch | None = None
    """That it takes part in."""
    prepared: Outcome | None = None
    waiting_for: tuple[str, ...] = ()
    lost: Loss | None = None
    offer: Fetch | None = None
    """Where newer state than ours is."""
    out: str | None = None
    """Why the worker is out of the group: it must say Hello again."""
    ended: Ended | Refused | None = None
    """The run is over, or goes on without this worker."""

    def receive(self, term: int, message: Message) -> View:
        """What a message of a coordinator makes of it."""
        if term < self.term:
            return self
        view = replace(self, term=term)
        match message:
            case Commit():
                return view._commit(message)
            case Enter(epoch):
                return view._enter(epoch)
            case Fetch(outcome):
                # Members of an epoch need no state, and what says otherwise is late (one of an earlier term may);
                # unless the others have gone on, and the word that this worker is out was lost with its connection.
                ours = view.epoch is not None and view.epoch.id.term == term
                if outcome == view.committed or (ours and outcome.step <= view.committed.step):
                    return view
                return replace(view._without_epoch(), prepared=view.prepared, offer=message)
            case Evicted(reason, must_fetch):
                if must_fetch:
                    return replace(view._without_epoch(), committed=NOTHING, out=reason)
                # What was prepared may yet turn out to be what the others have taken.
                return replace(view._without_epoch(), prepared=view.prepared, out=reason)
            case Refused() | Ended():
                return replace(view, ended=message, offer=None)  # Who would give it has left.

    def prepare(self, epoch: EpochId, digest: str) -> View:
        """The reduction of the next step is done: vote. Of no effect if there is another epoch meanwhile."""
        if self.epoch is None or self.epoch.id != epoch or self.prepared is not None:
            return self
        return replace(self, prepared=Outcome(self.committed.step + 1, digest), waiting_for=())

    def fetched(self, outcome: Outcome) -> View:
        """State was taken over from others."""
        return replace(self._without_epoch(), committed=outcome, offer=None)

    def suspect(self, epoch: EpochId, waiting_for: tuple[str, ...] = (), lost: Loss | None = None) -> View:
        """Who is silent in the collective of an epoch, or why it has failed."""
        if self.epoch is None or self.epoch.id != epoch:
            return self
        return replace(self, waiting_for=waiting_for, lost=lost or self.lost)

    def standing(self, serial: int, speed: float = 0.0, link: LinkSpeed = UNKNOWN) -> Standing:
        """What the coordinator is told."""
        epoch = self.epoch.id if self.epoch else None
        return Standing(serial, self.committed, epoch, self.prepared, speed, self.waiting_for, self.lost, *link)

    def _commit(self, message: Commit) -> View:
        view = self
        if view.prepared == message.outcome:
            view = replace(view, committed=message.outcome, prepared=None, offer=None)
        epoch = view.epoch
        if epoch is not None and epoch.id == message.epoch and view.committed == message.outcome:
            seats = tuple(
                replace(seat, weight=weight) for seat, weight in zip(epoch.seats, message.weights, strict=True)
            )
            view = replace(view, epoch=replace(epoch, committed=view.committed, seats=seats))
        return view

    def _enter(self, epoch: Epoch) -> View:
        known = self.epoch.id if self.epoch else None
        seated = any(seat.worker == self.worker for seat in epoch.seats)
        # A commit that we have missed comes before: the coordinator sees from our standing that it is due.
        if (
            not seated
            or (self.newest and epoch.id < self.newest)
            or epoch.id == known
            or epoch.committed != self.committed
        ):
            return self
        return replace(self._without_epoch(), epoch=epoch, newest=epoch.id, offer=None)

    def _without_epoch(self) -> View:
        return replace(self, epoch=None, prepared=None, waiting_for=(), lost=None)
