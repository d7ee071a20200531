"""The coordinator as a pure function: `transition(state, event, now_s) -> (state, actions)`.

What must hold whatever happens, and is tested over random orders of events:

- I1: a step is committed once, by all members of the epoch or by none.
- I2: whoever has taken step s has the same state.
- I3: nobody is told of a commit that is not in the journal.
- I4: a worker that is cut off does not advance.

An event changes what is known of one worker. Then, whatever the event was, the rules are applied to what is known:
commit if all have voted, give up who is dead, form an epoch where one is due, tell whoever lags where the run is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from mlx_distributed.elastic.protocol import (
    NOTHING,
    Action,
    Append,
    Commit,
    CommitRecord,
    Disconnected,
    End,
    Ended,
    Enter,
    Epoch,
    EpochRecord,
    Event,
    Evicted,
    Fetch,
    Hello,
    Leave,
    Message,
    Outcome,
    Probe,
    Probed,
    Refused,
    Report,
    Send,
    Standing,
    Tick,
    WaitFor,
    WorkerId,
)
from mlx_distributed.elastic.state import (
    APART_S,
    MAX_DISAGREEMENTS,
    MAX_LOSSES,
    NUM_STEP_TIMES,
    PROBE_AGAIN_S,
    SILENCE_S,
    Member,
    Names,
    State,
    names,
)


def transition(state: State, event: Event, now_s: float) -> tuple[State, tuple[Action, ...]]:
    """What the coordinator makes of an event at `now_s` of its monotonic clock."""
    turn = _Turn(state.at(now_s), now_s)
    if state.ended is None:
        turn.take_in(event)
        turn.settle(event)
    elif isinstance(event, Hello):
        turn.dismiss(event.worker, event.standing)
    return turn.state, tuple(turn.actions)


class _Turn:
    """One call of `transition`: the state as it becomes, and what is to be done."""

    def __init__(self, state: State, now_s: float) -> None:
        self.before, self.state, self.now_s = state, state, now_s
        self.actions: list[Action] = []

    def send(self, worker: WorkerId, message: Message) -> None:
        self.actions.append(Send(worker, message))

    def put(self, member: Member) -> None:
        self.state = replace(self.state, members={**self.state.members, member.worker.name: member})

    def dismiss(self, worker: WorkerId, standing: Standing) -> None:
        """Tell a worker that comes when all is over: it has taken steps of this run, or is not let in any more."""
        if self.state.finished and standing.committed.step > 0:
            self.send(worker, Ended(self.state.result(), failed=False))
        else:
            reason = self.state.ended or "all steps are taken, by workers that have left"
            self.send(worker, Refused(f"this run is over: {reason}"))

    def take_in(self, event: Event) -> None:
        """What an event says of the worker that it is about."""
        if isinstance(event, Hello):
            self._hello(event)
        elif not isinstance(event, Tick):
            member = self.state.member(event.worker)
            match event:
                case Report() if member is None:
                    self.send(event.worker, Evicted("the coordinator does not know this worker any more"))
                case _ if member is None:
                    pass
                case Report():
                    self._hear(member, event.standing)
                case Disconnected() if self.state.in_epoch(event.worker):
                    self._probe(replace(member, connected=False))
                case Disconnected():
                    self._remove(member, "")
                case Probed():
                    self._probed(member, event.refused)
                case Leave():
                    self._remove(member, f"{member.worker.name} has left ({event.reason})")

    def settle(self, event: Event) -> None:
        """Apply the rules to what is known."""
        self._adopt()
        self._commit()
        if self.state.ended is not None:
            return
        self._judge()
        self._form()
        self._wait()
        if self.state.committed != self.before.committed or self.state.epoch is not self.before.epoch:
            for member in self.state.members.values():
                self._tell(member)
        elif isinstance(event, Hello | Report) and (told := self.state.member(event.worker)):
            self._tell(told)

    def _hello(self, event: Hello) -> None:
        refusal = self.state.refusal(event)
        if refusal:
            self.send(event.worker, Refused(refusal))
            return
        worker, state = event.worker, self.state
        if worker.incarnation in state.distrusted:
            if event.standing.committed != NOTHING:
                self.send(worker, Evicted("its state is not that of the others", must_fetch=True))
                return
            self.state = replace(state, distrusted=state.distrusted - {worker.incarnation})
        known = state.members.get(worker.name)
        if known and known.worker != worker:
            if self.now_s - known.heard_s < SILENCE_S:
                # The one that we know may have died just now, or the newcomer may be a message from the past.
                self._probe(known)
                self.send(
                    worker,
                    Evicted(f"a worker named {worker.name} is in this run; if it is another one, give this one a name"),
                )
                return
            self._evict(known, "another process of that name has come while it was silent")
            known = None
        if known is None or event.standing.serial > known.standing.serial:
            self.put(Member(worker, event.address, event.standing, self.now_s, connected=True))
            self.state = self.state.hearing_of(worker.name)

    def _hear(self, member: Member, standing: Standing) -> None:
        newest = standing if standing.serial > member.standing.serial else member.standing
        self.put(replace(member, standing=newest, heard_s=self.now_s))

    def _probe(self, member: Member) -> None:
        if not member.probing:
            self.actions.append(Probe(member.worker, member.address))
            member = replace(member, probing=True, probed_s=self.now_s)
        self.put(member)

    def _probed(self, member: Member, refused: bool) -> None:
        if not member.probing:  # It has said Hello meanwhile.
            return
        if refused:
            self._evict(member, "nobody answers at its address any more")
        else:
            self.put(replace(member, probing=False))

    def _evict(self, member: Member, reason: str, must_fetch: bool = False) -> None:
        self.send(member.worker, Evicted(reason, must_fetch))
        self._remove(member, f"{member.worker.name} is out: {reason}")

    def _remove(self, member: Member, reason: str) -> None:
        state = self.state
        broken = state.broken or (reason if state.in_epoch(member.worker) else None)
        members = {name: other for name, other in state.members.items() if name != member.worker.name}
        self.state = replace(state, members=members, broken=broken)

    def _adopt(self) -> None:
        """What members of the last epoch know better than the journal, where a disk has lost its newest records."""
        epoch = self.state.epoch
        if epoch is None:
            return
        for member in self.state.members.values():
            committed, theirs = member.standing.committed, member.standing.epoch or epoch.id
            if theirs > epoch.id and self.state.in_epoch(member.worker) and self.state.broken is None:
                self.state = replace(self.state, broken="the journal lacks the last epoch")
            if committed.step > self.state.committed.step and (theirs > epoch.id or self.state.in_epoch(member.worker)):
                self._take(committed)
                self.state = replace(self.state, broken=f"the journal lacked step {committed.step}")

    def _commit(self) -> None:
        """Take the step if all members have voted alike."""
        state = self.state
        seated = state.seated()
        votes = {member.worker.name: vote for member in seated if (vote := state.vote(member))}
        if votes and state.voted_s is None:
            self.state = state = replace(state, voted_s=self.now_s)
        if state.epoch is None or len(votes) < len(state.epoch.seats):
            return
        ((outcome, num_equal), *others) = Counter(votes.values()).most_common()
        if not others:
            self._take(outcome)
            return
        majority = [member for member in seated if votes[member.worker.name] == outcome]
        if 2 * num_equal > len(seated):
            for member in seated:
                if member not in majority:
                    self.state = replace(self.state, distrusted=self.state.distrusted | {member.worker.incarnation})
                    other = votes[member.worker.name].digest
                    self._evict(
                        member,
                        f"its reduced gradient of step {outcome.step} has digest {other[:16]}, and that of "
                        f"{names(majority)}, the majority, has {outcome.digest[:16]}",
                        must_fetch=True,
                    )
            return
        if state.broken is not None:  # The next epoch is due already, and has not been formed yet.
            return
        found = ", ".join(f"{vote.digest[:16]} on {name}" for name, vote in sorted(votes.items()))
        reason = f"the reduced gradients of step {outcome.step} differ ({found}), with no majority"
        self.state = replace(state, disagreements=state.disagreements + 1, broken=reason)
        if self.state.disagreements >= MAX_DISAGREEMENTS:
            self._end(
                f"{reason}, {MAX_DISAGREEMENTS} times; the step is not taken: look for a machine with bad memory or "
                "another processor, and go on from the last checkpoint without it",
                failed=True,
            )

    def _take(self, outcome: Outcome) -> None:
        """The step is taken: written down first, and told by `settle`."""
        state, epoch = self.state, self.state.epoch
        assert epoch is not None
        members = state.seated()
        # In place of members that are gone their last weights: shares are by rank.
        current = {seat.worker: seat for seat in state.seats_of(members)}
        seats = tuple(current.get(seat.worker, seat) for seat in epoch.seats)
        self.actions.append(Append(CommitRecord(outcome, tuple(seat.weight for seat in seats))))
        self.state = replace(
            state,
            committed=outcome,
            epoch=replace(epoch, committed=outcome, seats=seats),
            losses={},
            num_stalls=0,
            disagreements=0,
            step_times_s=(*state.step_times_s, self.now_s - state.begun_s)[-NUM_STEP_TIMES:],
            begun_s=self.now_s,
            voted_s=None,
        )

    def _judge(self) -> None:
        """Give up members that are dead: nobody else can go on, and they are silent."""
        if self.state.finished:
            for member in self.state.in_doubt():
                if self.now_s - member.heard_s >= self.state.patience_s():
                    self._remove(member, "")
            return
        self._follow_losses()
        self._follow_waits()
        for member in self.state.seated():
            if not member.connected and self.now_s - (member.probed_s or 0.0) >= PROBE_AGAIN_S:
                self._probe(member)
        state = self.state
        for member in state.seated():
            silent_s = self.now_s - member.heard_s
            if silent_s >= state.patience_s() and member.worker.name in state.waited_for():
                self._evict(member, f"it was silent for {silent_s:.1f} s while others waited for it")
                self.state = self.state.giving_up(member.worker.name)
            elif (
                state.voted_s is not None
                and self.now_s - state.voted_s >= state.rules.vote_s
                and not state.vote(member)
            ):
                self._evict(member, f"it had no result {state.rules.vote_s:g} s after others had theirs")

    def _follow_losses(self) -> None:
        """A collective has failed: is the peer dead, or only the connection?"""
        for member in self.state.seated():
            loss = member.standing.lost
            if loss is None or not self.state.is_current(member) or self.state.broken is not None:
                continue
            peer = next((other for other in self.state.seated() if other.worker.name == loss.name), member)
            if peer is member or peer.alive:
                self._lost_though_alive(member, peer, loss.reason)
            elif peer.probed_s is None:
                self._probe(peer)

    def _lost_though_alive(self, member: Member, peer: Member, reason: str) -> None:
        """Once, the same members try again; if it happens again, one of the two must go."""
        first, second = pair = self.state.names_by_rank(member, peer)
        losses = Counter(self.state.losses) + Counter([pair])
        words = f"{first} and {second} do not reach each other" if first != second else f"{first} cannot go on"
        self.state = replace(self.state, losses=losses, broken=f"{words} ({reason})")
        if losses[pair] >= MAX_LOSSES:
            self._bar(pair, losses)

    def _follow_waits(self) -> None:
        """Two that are well wait for each other: what one sends does not get to the other. The first time they may not
        be the only ones that wait; then the same members try again, and wait for nobody else when they connect."""
        state = self.state
        pairs = state.apart() if state.broken is None else ()
        since_s = {pair: state.apart_since_s.get(pair, self.now_s) for pair in pairs}
        self.state = replace(state, apart_since_s=since_s)
        silent_s = self.now_s - min(since_s.values(), default=self.now_s)
        if silent_s >= max(APART_S, state.patience_s()):
            words = "{} and {} do not reach each other".format(*pairs[0])
            reason = f"{words} (nothing has come through for {silent_s:.1f} s)"
            self.state = replace(self.state, num_stalls=state.num_stalls + 1, broken=reason)
            if self.state.num_stalls >= MAX_LOSSES:
                self._bar(pairs[0], pairs)

    def _bar(self, pair: Names, pairs: Collection[Names]) -> None:
        """One of two goes: who is in trouble with more of the others; then who came later."""
        name = max(pair, key=lambda name: (sum(name in each for each in pairs), pair.index(name)))
        self.state, for_s = self.state.barring(name)
        self._evict(self.state.members[name], f"{self.state.broken}; it may come back in {for_s:.0f} s")

    def _form(self) -> None:
        """Form an epoch in place of one that is broken, or with newcomers that have the state of the last commit.

        A newcomer enters before the first vote on the next step, so no finished reduction is done again; what the
        others have computed of the step stays good.
        """
        state = self.state
        running = state.epoch is not None and state.broken is None
        if running and (state.voted_s is not None or len(state.seated()) == len(state.members)):
            return
        ready = state.ready(self.now_s)
        newcomers = [member for member in ready if not state.in_epoch(member.worker)]
        if running and not newcomers:
            return
        if state.finished or state.in_doubt() or len(ready) < state.min_workers(self.now_s):
            return
        arrived = f"{names(newcomers)} joined" if newcomers else "an epoch was due"
        epoch = Epoch(state.next_epoch(), state.committed, state.seats_of(ready), state.broken or arrived)
        self.actions.append(Append(EpochRecord(epoch)))
        self.state = replace(
            state,
            sequence=epoch.id.sequence,
            epoch=epoch,
            broken=None,
            members={name: replace(member, probed_s=None) for name, member in state.members.items()},
            begun_s=self.now_s,
            voted_s=None,
        )

    def _wait(self) -> None:
        """Say what is waited for, and give up after a while; where all is done, end."""
        state = self.state
        if state.finished and all(member.connected and not state.holds(member) for member in state.members.values()):
            for member in state.members.values():
                self.dismiss(member.worker, member.standing)
            self.state = state = replace(state, members={})
            if not state.cut_off():
                self._end("all steps are taken", failed=False)
                return
        reason = state.missing(self.now_s)
        since_s = None if not reason else self.now_s if state.waiting_since_s is None else state.waiting_since_s
        if reason != state.waiting:
            self.actions.append(WaitFor(reason))
            self.state = replace(state, waiting=reason, waiting_since_s=since_s)
        if since_s is not None and not state.finished and self.now_s - since_s >= state.rules.wait_s:
            self._end(f"gave up after {state.rules.wait_s:g} s: {reason}", failed=True)

    def _end(self, reason: str, failed: bool) -> None:
        if self.state.ended is None:
            self.state = replace(self.state, ended=reason)
            for member in self.state.members.values():
                self.send(member.worker, Ended(reason, failed))
            self.actions.append(End(reason, failed))

    def _tell(self, member: Member) -> None:
        """Tell a worker that lags behind where the run is. What is told twice does no harm."""
        state, standing, epoch = self.state, member.standing, self.state.epoch
        if not member.connected or state.ended is not None:
            return
        if standing.committed != state.committed:
            if standing.prepared != state.committed or epoch is None:
                sources = tuple(
                    other.address for other in state.members.values() if other.connected and state.holds(other)
                )
                if sources:
                    self.send(member.worker, Fetch(state.committed, sources))
                return
            weights = tuple(seat.weight for seat in epoch.seats)
            self.send(member.worker, Commit(state.committed, epoch.id, weights))
        running = epoch is not None and state.broken is None and not state.finished
        if epoch is not None and running and state.in_epoch(member.worker) and standing.epoch != epoch.id:
            self.send(member.worker, Enter(epoch))
