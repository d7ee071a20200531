"""`run_elastic`: a run whose members come and go; the loop around the steps, outside of the trainer.

A step is prepared by a group, that of one `Epoch`, and taken when the coordinator says so. When a member is lost the
step stays: what this worker has computed of it is kept, the members of the next epoch share out what is missing, and
add up anew. So nothing is computed twice but what the lost one had computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.tree_sum import Node
from mlx_distributed.elastic.assignment import assign, undivided
from mlx_distributed.elastic.links import Linked, share_by_links
from mlx_distributed.elastic.membership import Membership
from mlx_distributed.elastic.protocol import Epoch, EpochId, Fetch, Loss, Outcome, Refused, WorkerId
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import CommError, TrainingError

SUSPECT_S = 0.5
"""A peer that the collective waits for and that has been silent for so long is named to the coordinator."""
WATCH_S = 0.1
LOOK_S = 0.5
"""So often is looked at what no message tells: that the coordinator is away, or that this worker is to leave."""

RETRY_S = 0.5
"""After a transfer of state that has failed."""

InfoT = TypeVar("InfoT")
AttemptT = TypeVar("AttemptT", bound="Attempt")


class Group(Communicator, Linked, Protocol):
    """A communicator that another thread may look into, and end."""

    def connect(self, addresses: Sequence[str]) -> None: ...

    def silent(self, for_s: float) -> list[int]:
        """Ranks that are waited for and have been silent for so long."""
        ...

    def interrupt(self, reason: str) -> None:
        """Let the call that is under way, and all later ones, raise CommError."""
        ...


class Attempt(Protocol):
    """A step that is being taken; `train.attempt` says more."""

    @property
    def divisible(self) -> bool: ...
    @property
    def num_leaves(self) -> int: ...
    @property
    def held(self) -> Sequence[Node]: ...
    @property
    def speed(self) -> float: ...
    def keep(self, nodes: Collection[Node]) -> None: ...
    def reduce(self, leaves: Sequence[int], comm: Communicator) -> str: ...
    def settle(self) -> None: ...


class Run(Protocol[AttemptT, InfoT]):
    """What is trained, as far as this room needs to know."""

    @property
    def num_steps(self) -> int: ...

    @property
    def step(self) -> int:
        """Steps taken."""
        ...

    @property
    def leaving(self) -> bool:
        """This worker is to end as soon as it is in no epoch."""
        ...

    @property
    def leaving_others(self) -> bool:
        """This worker is to end at once, and the others are not: they take over what it was computing. What follows
        the last step it still does."""
        ...

    def enter(self, group: Group, members: Sequence[str]) -> None:
        """Called on all members of an epoch, given by name in rank order, before anything else. All have taken the same
        steps. May raise CommError of the group."""
        ...

    def attempt(self) -> AttemptT:
        """A new one, of the next step."""
        ...

    def commit(self, attempt: AttemptT) -> InfoT:
        """Take the step. Touches no other machine."""
        ...

    def fetch(self, offer: Fetch) -> Outcome | None:
        """Take over newer state from others; what it is the state of, None where that failed."""
        ...

    def taken(self, info: InfoT | None, group: Communicator) -> None:
        """The last step has been taken, or at step 0, the run begins. Called on all members of an epoch, and again in
        the next one where it has not come to its end on all of them, or rank 0 is another one. `info` is None where
        somebody else has taken the step. May raise CommError of the group."""
        ...

    def alone(self) -> None:
        """There has been no coordinator for long. Called once."""
        ...

    def abandoned(self, away_s: float) -> TrainingError:
        """There has been no coordinator for so long that this worker ends: why, and how to go on, for people."""
        ...

    def missed(self, result: str) -> None:
        """The others have come to the end of the run without this worker, which ends as well."""
        ...


def run_elastic(
    run: Run[AttemptT, InfoT],
    member: Membership,
    form: Callable[[EpochId, int, int], Group],
    grace_s: float,
    wait_s: float,
    measures_links: bool = True,
) -> None:
    """Take the steps of a run together with whoever is there, until all are taken, or this worker is to leave.

    Args:
        run: whose state this worker holds.
        member: of this worker; its view knows what step the state is of.
        form: makes the group of an epoch, not yet connected, given its id, the rank in it and its size.
        grace_s: for how long the coordinator may be away before `run.alone` is called.
        wait_s: for how much longer it is waited for then.
        measures_links: of workers on several machines, the same on all of them; otherwise links count as alike.

    Raises:
        TrainingError: this worker is not let in, the run has failed, or the coordinator does not come back.
    """
    _Loop(run, member, form, grace_s, wait_s, measures_links).run()


class _Loop(Generic[AttemptT, InfoT]):
    def __init__(
        self,
        run: Run[AttemptT, InfoT],
        member: Membership,
        form: Callable[[EpochId, int, int], Group],
        grace_s: float,
        wait_s: float,
        measures_links: bool,
    ) -> None:
        self._run, self._member, self._form = run, member, form
        self._grace_s, self._wait_s = grace_s, wait_s
        self._measures_links = measures_links
        self._attempt: AttemptT | None = None
        self._failed: EpochId | None = None
        """The epoch whose group has failed here."""
        self._info: InfoT | None = None
        """Of the last step taken; None where somebody else took it."""
        self._told = run.step or -1
        """The last step for which `taken` has come to its end here; the beginning counts as one."""
        self._leader: WorkerId | None = None
        """Rank 0 of the group that came to its end with it."""
        self._was_alone = False

    def run(self) -> None:
        while self._run.step < self._run.num_steps:  # No epoch follows the last one, in which anything could be told.
            view = self._wait(lambda v: self._to_enter(v) or v.offer or self._to_commit(v) or self._run.leaving)
            if self._run.leaving_others or (
                self._run.leaving and not self._to_enter(view) and not self._to_commit(view)
            ):
                return
            if self._to_commit(view):
                self._commit()
            elif epoch := self._to_enter(view):
                self._take_part(epoch, view)
            elif view.offer is not None:
                self._fetch(view.offer)
            else:
                assert view.ended is not None
                self._run.missed(view.ended.reason)
                return

    def _to_enter(self, view: View) -> Epoch | None:
        return view.epoch if view.epoch is not None and view.epoch.id != self._failed else None

    def _to_commit(self, view: View) -> bool:
        return self._attempt is not None and view.committed.step > self._run.step

    def _wait(self, ready: Callable[[View], object]) -> View:
        """Until the view is as wanted, or the run has come to its end without this worker."""
        while True:
            view = self._member.wait(lambda v: v if v.ended or ready(v) else None, LOOK_S)
            if view is None:
                away_s = self._member.away_s
                if not self._was_alone and away_s >= self._grace_s:
                    self._was_alone = True
                    self._run.alone()
                elif away_s >= self._grace_s + self._wait_s:
                    raise self._run.abandoned(away_s)
            elif (isinstance(view.ended, Refused) or (view.ended and view.ended.failed)) and not ready(view):
                raise TrainingError(view.ended.reason)
            else:
                return view

    def _fetch(self, offer: Fetch) -> None:
        outcome = self._run.fetch(offer)
        if outcome is not None:
            self._attempt, self._info, self._told = None, None, self._run.step
            self._member.change(lambda view: view.fetched(outcome))
        else:
            self._member.wait(lambda view: view.ended or view.offer != offer, RETRY_S)

    def _commit(self) -> None:
        assert self._attempt is not None
        self._info, self._attempt = self._run.commit(self._attempt), None

    def _take_part(self, epoch: Epoch, view: View) -> None:
        """Take steps in an epoch, until it is over."""
        rank = next(rank for rank, seat in enumerate(epoch.seats) if seat.worker == view.worker)
        try:
            with self._group(epoch, rank) as group:
                self._run.enter(group, [seat.worker.name for seat in epoch.seats])
                held, seats = self._agree(epoch, group), epoch.seats
                while self._run.step < self._run.num_steps:
                    self._prepare(epoch.id, [seat.weight for seat in seats], held, rank, group)
                    view = self._wait(lambda v: self._to_commit(v) or _over(v, epoch.id))
                    if not self._to_commit(view):
                        return
                    self._commit()
                    # After the last step there is no other epoch to tell of it in: where this one is over, rank 0 does.
                    if _over(view, epoch.id) and self._run.step < self._run.num_steps:
                        return
                    self._tell(epoch, group)
                    if self._leaves() or view.epoch is None:
                        return
                    held, seats = [()] * len(seats), view.epoch.seats
        except CommError as error:
            self._failed = epoch.id
            peer = view.worker.name if error.peer is None else epoch.seats[error.peer].worker.name
            loss = Loss(peer, error.reason)
            self._member.change(lambda view: view.suspect(epoch.id, lost=loss))
            left = [other for other in range(len(epoch.seats)) if other != error.peer]
            if self._run.step >= self._run.num_steps and self._told < self._run.step:
                # No epoch follows the last step: the first of those that are left does by itself what is to be done.
                if rank == left[0]:
                    self._run.taken(self._info, LocalComm())
                self._told = self._run.step

    def _agree(self, epoch: Epoch, group: Group) -> list[tuple[Node, ...]]:
        """What each rank holds of the step. Before that, all do what follows a step, if anybody has not done it yet, or
        if who tells people has changed: the one before may have been lost before it could."""
        untold = self._told < self._run.step or self._leader not in (None, epoch.seats[0].worker)
        mine = [int(untold), *(edge for node in self._held() for edge in node)]
        gathered = [np.asarray(array).tolist() for array in group.all_gather(mx.array(mine, mx.int64), "what is held")]
        if any(untold for untold, *_ in gathered):
            self._tell(epoch, group)
        return [tuple(zip(edges[::2], edges[1::2], strict=True)) for _, *edges in gathered]

    def _held(self) -> Sequence[Node]:
        if self._attempt is None and self._run.step < self._run.num_steps:
            self._attempt = self._run.attempt()
        return self._attempt.held if self._attempt is not None else ()

    def _tell(self, epoch: Epoch, group: Group) -> None:
        self._run.taken(self._info, group)
        self._told, self._leader = self._run.step, epoch.seats[0].worker

    def _prepare(
        self, epoch: EpochId, weights: Sequence[float], held: Sequence[tuple[Node, ...]], rank: int, group: Group
    ) -> None:
        """Compute this worker's share of the step, add up, and vote."""
        attempt = self._attempt = self._attempt or self._run.attempt()
        share = assign(attempt.num_leaves, held if attempt.divisible else undivided(held), weights)[rank]
        attempt.keep(share.keep)
        digest = attempt.reduce([leaf for node in share.compute for leaf in range(*node)], group)
        self._member.change(lambda view: view.prepare(epoch, digest), speed=attempt.speed)
        attempt.settle()

    @contextmanager
    def _group(self, epoch: Epoch, rank: int) -> Iterator[Group]:
        """The group of an epoch, for as long as that is the epoch of this worker."""
        group = self._form(epoch.id, rank, len(epoch.seats))
        closed = threading.Event()
        watch = threading.Thread(target=self._watch, args=(epoch, group, closed), name="watch", daemon=True)
        watch.start()
        try:
            group.connect([seat.address for seat in epoch.seats])
            if self._measures_links and (link := share_by_links(epoch.seats, rank, group)):
                self._member.change(lambda view: view, link=link)
            yield group
        except BaseException as error:
            group.close(error)
            raise
        else:
            group.close()
        finally:
            closed.set()
            watch.join()

    def _leaves(self) -> bool:
        """Leave, where this worker is to and the others are not: they hear of it before its part of the group ends."""
        leaves = self._run.leaving_others and self._run.step < self._run.num_steps
        if leaves:
            self._member.leave("it was asked to end")
        return leaves

    def _watch(self, epoch: Epoch, group: Group, closed: threading.Event) -> None:
        """In a thread of its own: leave the run where that is asked for, end the group with its epoch, and name who is
        silent in it."""
        while not closed.is_set():
            self._leaves()
            if self._member.wait(lambda view: _over(view, epoch.id) or closed.is_set(), WATCH_S):
                if not closed.is_set():
                    group.interrupt("the members of the run have changed")
                return
            silent = tuple(epoch.seats[rank].worker.name for rank in group.silent(SUSPECT_S))
            if silent != self._member.view.waiting_for:
                self._member.change(lambda view, silent=silent: view.suspect(epoch.id, silent))  # type: ignore[misc]


def _over(view: View, epoch: EpochId) -> bool:
    """Whether an epoch is not that of this worker any more."""
    return view.ended is not None or view.epoch is None or view.epoch.id != epoch
