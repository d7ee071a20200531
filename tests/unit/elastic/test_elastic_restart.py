"""The coordinator comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_desk import FIRST, RULES, Desk, worker

from mlx_distributed.elastic.protocol import (
    START,
    Append,
    Commit,
    CommitRecord,
    End,
    Epoch,
    EpochId,
    EpochRecord,
    Leave,
    Outcome,
    Probe,
    Probed,
    Record,
    RollbackRecord,
    RunRecord,
    TermRecord,
    Tick,
    WaitFor,
)
from mlx_distributed.elastic.replay import started
from mlx_distributed.elastic.state import SILENCE_S
from mlx_distributed.errors import ConfigError


def journal_of_two() -> tuple[Record, ...]:
    desk = Desk()
    desk.enter("a", "b")
    desk.vote("a")
    desk.vote("b")
    return tuple(desk.journal)


def test_the_term_rises_and_the_epoch_goes_on() -> None:
    desk = Desk(records=journal_of_two())
    assert desk.journal[-1] == TermRecord(2)
    assert set(desk.actions) == {Append(TermRecord(2)), Probe(worker("a"), "a:1"), Probe(worker("b"), "b:1")}
    assert desk.state.committed == Outcome(1, "d")
    before = desk.epoch
    for name in "ab":
        desk.hello(name, epoch=before.id, prepared=Outcome(2, "e"))
    assert desk.state.committed == Outcome(2, "e"), "what all had prepared is committed"
    assert desk.epoch.id == before.id
    desk.happen(Leave(worker("b"), "SIGTERM"))
    assert desk.epoch.id == EpochId(2, 1)


def test_a_commit_that_was_written_and_not_told_is_told() -> None:
    desk = Desk(records=journal_of_two())
    desk.hello("a", START, epoch=desk.epoch.id, prepared=Outcome(1, "d"))
    assert desk.sent("a") == [Commit(Outcome(1, "d"), desk.epoch.id, (1.0, 1.0))]


def test_the_last_commit_that_was_not_told_is_told() -> None:
    desk = Desk(replace(RULES, num_steps=1), journal_of_two())
    desk.happen(Tick(), after_s=0.1)
    assert desk.state.ended is None, "its members are waited for"
    desk.hello("a", START, epoch=desk.epoch.id, prepared=Outcome(1, "d"))
    assert desk.sent("a") == [Commit(Outcome(1, "d"), desk.epoch.id, (1.0, 1.0))]
    desk.happen(Probed(worker("b"), refused=True))
    desk.report("a", epoch=desk.epoch.id)
    desk.happen(Leave(worker("a"), "its work is done"))
    assert desk.actions == (End("all steps are taken", failed=False),)


@pytest.mark.parametrize("refused", [True, False])
def test_a_run_that_was_over_is_over_again(refused: bool) -> None:
    desk = Desk(replace(RULES, num_steps=1), journal_of_two())
    for name in "ab":
        desk.happen(Probed(worker(name), refused=refused))
    desk.wait(0.1 if refused else SILENCE_S)
    assert desk.state.ended == "all steps are taken"


def test_one_that_died_meanwhile_is_found_out_and_the_step_is_tried_again() -> None:
    desk = Desk(records=journal_of_two())
    desk.hello("a", epoch=desk.epoch.id, prepared=Outcome(2, "e"))
    desk.happen(Probed(worker("b"), refused=True))
    assert desk.state.committed == Outcome(1, "d")
    assert desk.names == ["a"]
    assert desk.epoch.id == EpochId(2, 1)


def test_one_that_stays_away_is_waited_for_only_so_long() -> None:
    desk = Desk(records=journal_of_two())
    desk.hello("c")
    assert desk.names == ["a", "b"]
    for name in "ab":
        desk.happen(Probed(worker(name), refused=False))
    desk.wait(SILENCE_S, "c")
    assert desk.names == ["c"]


def test_a_commit_that_the_disk_has_lost_is_taken_over_from_a_member() -> None:
    (*records, _) = journal_of_two()
    desk = Desk(records=tuple(records))
    assert desk.state.committed == START
    desk.hello("a", Outcome(1, "d"), epoch=desk.epoch.id)
    assert desk.appended()[0] == CommitRecord(Outcome(1, "d"), (1.0, 1.0))
    desk.hello("b", START, epoch=desk.epoch.id, prepared=Outcome(1, "d"))
    assert desk.epoch.reason == "the journal lacked step 1"
    assert desk.epoch.committed == Outcome(1, "d")
    assert desk.names == ["a", "b"]


def test_an_epoch_that_the_disk_has_lost_is_replaced() -> None:
    desk = Desk(records=journal_of_two())
    for name in "ab":
        desk.hello(name, epoch=EpochId(1, 9))
    assert desk.epoch.id == EpochId(2, 1)
    assert desk.epoch.reason == "the journal lacks the last epoch"


def test_a_state_that_nobody_has_is_waited_for_in_words() -> None:
    desk = Desk(replace(RULES, wait_s=5.0), journal_of_two())
    for name in "ab":
        desk.happen(Probed(worker(name), refused=True))
    desk.hello("c", START)
    (wait,) = [action for action in desk.actions if isinstance(action, WaitFor)]
    assert wait.reason.startswith("nobody who is here (c) has the state after step 1; waiting for a worker that has it")
    assert "--resume" in wait.reason
    desk.wait(6, "c")
    assert any(isinstance(action, End) for action in desk.actions)


def test_a_person_may_go_back_to_a_checkpoint() -> None:
    desk = Desk(records=(*journal_of_two(), RollbackRecord(Outcome(0, "checkpoint"))))
    assert desk.state.committed == Outcome(0, "checkpoint")
    desk.hello("late", Outcome(1, "d"), epoch=FIRST)
    assert desk.state.committed.step == 0, "the steps after it are not taken over"
    desk.hello("a", Outcome(0, "checkpoint"))
    assert desk.names == ["a"]
    assert desk.epoch.id == EpochId(2, 1)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ((RunRecord("other"),), "the journal belongs to the run other, and this is the run run"),
        ((TermRecord(1),), "the journal belongs to the run unknown"),
        ((RunRecord("run"), TermRecord(1), TermRecord(1)), "cannot follow step 0 in term 1"),
        ((RunRecord("run"), TermRecord(1), CommitRecord(Outcome(1, "d"), ())), "the journal is damaged"),
        ((RunRecord("run"), TermRecord(1), EpochRecord(Epoch(EpochId(2, 1), START, (), ""))), "is damaged"),
        ((RunRecord("run"), TermRecord(1), RollbackRecord(Outcome(9, "d"))), "is damaged"),
    ],
)
def test_a_journal_that_does_not_fit_is_refused(records: tuple[Record, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        started(RULES, records, 0.0)
