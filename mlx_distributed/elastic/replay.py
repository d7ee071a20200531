"""What a journal says: the state in which a coordinator starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_distributed.elastic.protocol import (
    NOTHING,
    Action,
    Append,
    CommitRecord,
    EpochRecord,
    Probe,
    Record,
    RollbackRecord,
    RunRecord,
    Standing,
    TermRecord,
)
from mlx_distributed.elastic.state import Member, Rules, State
from mlx_distributed.errors import ConfigError


def started(rules: Rules, records: Sequence[Record], now_s: float) -> tuple[State, tuple[Action, ...]]:
    """The state of a coordinator that starts from a journal, in a term of its own, and what it does first.

    The members of the last epoch are still its members: they come back and say what they have prepared, so a step that
    was finished while nobody coordinated is committed, and who was not told of the last one is. Those that are gone are
    found out by probing.

    Args:
        rules: of the run.
        records: of its journal, none for a new run.
        now_s: of the monotonic clock.

    Raises:
        ConfigError: the journal is of another run, or its records do not follow each other.
    """
    actions: list[Action] = []
    first = records[0] if records else RunRecord(rules.facts.run_id)
    if not isinstance(first, RunRecord) or first.run_id != rules.facts.run_id:
        whose = first.run_id if isinstance(first, RunRecord) else "unknown"
        raise ConfigError(
            f"the journal belongs to the run {whose}, and this is the run {rules.facts.run_id}: a run goes on in its "
            "own output_dir; choose another --output-dir for a new one"
        )
    if not records:
        actions.append(Append(first))
    state = State(rules, term=0, now_s=now_s, begun_s=now_s)
    for record in records[1:]:
        state = _replayed(state, record)
    state = replace(state, term=state.term + 1, sequence=0)
    actions.append(Append(TermRecord(state.term)))
    unheard = Standing(-1, NOTHING)
    seats = state.epoch.seats if state.epoch else ()
    members = {
        seat.worker.name: Member(seat.worker, seat.address, unheard, now_s, False, True, now_s) for seat in seats
    }
    actions += [Probe(member.worker, member.address) for member in members.values()]
    return replace(state, members=members), tuple(actions)


def _replayed(state: State, record: Record) -> State:
    epoch = state.epoch
    match record:
        case TermRecord(term) if term > state.term:
            return replace(state, term=term)
        case EpochRecord(new) if new.id.term == state.term and (epoch is None or new.id > epoch.id):
            return replace(state, epoch=new)
        case CommitRecord(outcome, weights) if (
            epoch is not None and outcome.step > state.committed.step and len(weights) == len(epoch.seats)
        ):
            seats = tuple(replace(seat, weight=weight) for seat, weight in zip(epoch.seats, weights, strict=True))
            return replace(state, committed=outcome, epoch=replace(epoch, committed=outcome, seats=seats))
        case RollbackRecord(outcome) if outcome.step <= state.committed.step:
            return replace(state, committed=outcome, epoch=None)
    raise ConfigError(
        f"the journal is damaged: {record} cannot follow step {state.committed.step} in term {state.term}; start again "
        "with --resume in a copy of the output_dir without the journal to go on from the last checkpoint"
    )
