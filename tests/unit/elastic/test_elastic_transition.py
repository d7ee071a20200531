"""Each rule of the coordinator, one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_desk import FACTS, FIRST, RULES, Desk, worker

from mlx_distributed.elastic.protocol import (
    NOTHING,
    START,
    Append,
    Commit,
    CommitRecord,
    Disconnected,
    End,
    Ended,
    Enter,
    EpochId,
    EpochRecord,
    Evicted,
    Facts,
    Fetch,
    Hello,
    Leave,
    Outcome,
    Probe,
    Probed,
    Refused,
    Report,
    WaitFor,
)
from mlx_distributed.elastic.state import SILENCE_S, TOGETHER_S


def test_the_first_worker_begins_and_others_join_before_a_vote() -> None:
    desk = Desk()
    desk.hello("a")
    assert desk.appended() == [EpochRecord(desk.epoch)]
    assert desk.sent("a") == [Enter(desk.epoch)]
    assert desk.epoch.id == FIRST
    desk.hello("b")
    assert desk.names == ["a", "b"]
    assert desk.epoch.reason == "b joined"
    desk.confirm()
    desk.vote("a")
    desk.hello("c")
    assert desk.names == ["a", "b"], "somebody has finished the reduction: not now"
    desk.vote("b")
    assert desk.appended()[0] == CommitRecord(Outcome(1, "d"), (1.0, 1.0))
    assert desk.names == ["a", "b"], "c has not got the new state yet"
    (fetch,) = desk.sent("c")
    assert fetch == Fetch(Outcome(1, "d"), ("a:1", "b:1"))
    desk.report("c")
    assert desk.names == ["a", "b", "c"]


def test_those_that_are_started_together_begin_together() -> None:
    desk = Desk(replace(RULES, first_workers=2))
    desk.hello("b")
    assert desk.state.epoch is None
    assert desk.state.waiting.startswith("1 of at least 2 workers are ready to train (b)")
    desk.hello("a")
    assert desk.names == ["a", "b"]
    desk.confirm()
    desk.vote("a")
    desk.vote("b")
    desk.happen(Leave(worker("a"), "done"))
    assert desk.names == ["b"], "later one is enough"


def test_one_that_never_comes_is_not_waited_for_long() -> None:
    desk = Desk(replace(RULES, first_workers=2))
    desk.hello("b")
    desk.wait(TOGETHER_S - 1, "b")
    assert desk.state.epoch is None
    desk.wait(2.0, "b")
    assert desk.names == ["b"]


def test_two_that_are_ready_while_a_vote_stands_in_the_way_enter_together_with_the_commit() -> None:
    """They have followed: the state before the step, and its reduced gradient."""
    desk = Desk()
    desk.enter("a", "x")
    desk.vote("x")
    for name in "bc":
        desk.hello(name, START, prepared=Outcome(1, "d"))
    desk.vote("a")
    assert desk.names == ["a", "x", "b", "c"]
    assert desk.epoch.committed == Outcome(1, "d")
    assert desk.epoch.reason == "b and c joined"
    assert desk.sent("b") == [Commit(Outcome(1, "d"), desk.epoch.id, (1.0,) * 4), Enter(desk.epoch)]


def test_a_commit_is_written_before_it_is_told_and_needs_all_votes() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    desk.vote("a")
    desk.vote("b")
    assert desk.appended() == []
    desk.vote("c")
    assert desk.state.committed == Outcome(1, "d")
    assert isinstance(desk.actions[0], Append)
    for name in "abc":
        assert desk.sent(name) == [Commit(Outcome(1, "d"), desk.epoch.id, (1.0, 1.0, 1.0))]
    desk.happen(Report(worker("a"), desk.stand(START, epoch=FIRST)))
    desk.vote("c", "x")  # for a step later
    assert desk.state.committed == Outcome(1, "d")


def test_a_vote_of_another_epoch_step_or_incarnation_does_not_count() -> None:
    desk = Desk()
    desk.enter("a")
    for standing in (
        desk.stand(START, epoch=EpochId(1, 9), prepared=Outcome(1, "d")),
        desk.stand(START, epoch=None, prepared=Outcome(1, "d")),
        desk.stand(START, epoch=FIRST, prepared=Outcome(2, "d")),
    ):
        desk.happen(Report(worker("a"), standing))
        assert desk.state.committed == START
    desk.happen(Report(worker("a", "0"), desk.stand(START, epoch=FIRST, prepared=Outcome(1, "d"))))
    assert desk.state.committed == START
    assert desk.evicted() == {"a": "the coordinator does not know this worker any more"}


def test_an_older_standing_that_arrives_late_is_passed_over() -> None:
    desk = Desk()
    desk.enter("a", "b")
    late = desk.stand(START, epoch=desk.epoch.id)
    desk.vote("a")
    desk.happen(Report(worker("a"), late))
    desk.vote("b")
    assert desk.state.committed == Outcome(1, "d")
    hello = Hello(worker("a"), "elsewhere:1", FACTS, late)
    desk.happen(hello)
    assert desk.state.members["a"].address == "a:1"


def test_a_death_before_its_vote_gives_an_epoch_of_the_survivors() -> None:
    """The stream ends; nobody answers at the address: no heartbeat is waited for."""
    desk = Desk()
    desk.enter("a", "b", "c")
    desk.vote("a")
    assert Probe(worker("b"), "b:1") in desk.happen(Disconnected(worker("b")))
    assert desk.names == ["a", "b", "c"]
    desk.happen(Probed(worker("b"), refused=True))
    assert desk.names == ["a", "c"]
    assert desk.epoch.committed == START, "the same step is tried again"
    assert desk.epoch.reason == "b is out: nobody answers at its address any more"
    assert desk.sent("a") == [Enter(desk.epoch)]


def test_a_death_after_all_have_voted_changes_nothing() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.vote("a")
    desk.vote("b")
    desk.happen(Disconnected(worker("b")))
    desk.happen(Probed(worker("b"), refused=True))
    assert desk.state.committed == Outcome(1, "d")
    assert desk.epoch.committed == Outcome(1, "d")
    assert desk.names == ["a"]


def test_a_stream_that_breaks_is_forgiven_when_the_worker_comes_back() -> None:
    desk = Desk()
    desk.enter("a", "b")
    before = desk.epoch
    desk.happen(Disconnected(worker("b")))
    desk.happen(Probed(worker("b"), refused=False))
    desk.hello("b", epoch=before.id, prepared=Outcome(1, "d"))
    desk.happen(Probed(worker("b"), refused=True))  # An answer that is too late.
    assert desk.epoch == before
    desk.vote("a")
    assert desk.state.committed == Outcome(1, "d")


def test_unequal_digests_are_not_committed_and_the_minority_fetches() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    for name, digest in (("a", "1111"), ("b", "2222"), ("c", "1111")):
        desk.vote(name, digest)
    assert desk.state.committed == START
    reason = "its reduced gradient of step 1 has digest 2222, and that of a and c, the majority, has 1111"
    assert desk.sent("b") == [Evicted(reason, must_fetch=True)]
    assert desk.names == ["a", "c"]
    desk.hello("b")  # It has not heard that its state is bad.
    assert desk.sent("b") == [Evicted("its state is not that of the others", must_fetch=True)]
    desk.hello("b", NOTHING)
    assert desk.sent("b") == [Fetch(START, ("a:1", "c:1"))]
    desk.report("b")
    assert desk.names == ["a", "c", "b"]


def test_no_majority_is_tried_again_once() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.vote("a", "1111")
    desk.vote("b", "2222")
    assert desk.names == ["a", "b"]
    assert desk.epoch.reason == "the reduced gradients of step 1 differ (1111 on a, 2222 on b), with no majority"
    desk.vote("a", "1111")
    desk.vote("b", "2222")
    end = desk.actions[-1]
    assert isinstance(end, End)
    assert end.failed
    assert "with no majority, 2 times; the step is not taken" in end.reason
    assert desk.sent("a") == [Ended(end.reason, failed=True)]
    assert desk.state.committed == START
    desk.hello("c")
    assert desk.sent("c") == [Refused(f"this run is over: {end.reason}")]


def test_one_that_leaves_is_not_waited_for() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.happen(Leave(worker("b"), "its lid is shut"))
    assert desk.names == ["a"]
    assert desk.epoch.reason == "b has left (its lid is shut)"
    desk.happen(Leave(worker("b"), "again"))
    assert desk.actions == ()


def test_too_few_workers_wait_and_give_up_with_a_reason() -> None:
    desk = Desk(replace(RULES, min_workers=2, wait_s=20.0))
    desk.hello("a")
    words = "1 of at least 2 workers are ready to train (a); waiting for more"
    assert desk.actions == (WaitFor(words),)
    desk.wait(19, "a")
    assert desk.actions == ()
    desk.wait(2, "a")
    assert desk.sent("a") == [Ended(f"gave up after 20 s: {words}", failed=True)]
    desk = Desk(replace(RULES, min_workers=2, wait_s=20.0))
    desk.enter("a", "b")
    assert desk.state.waiting == ""
    desk.happen(Leave(worker("b"), "SIGTERM"))
    assert desk.actions == (WaitFor(words),)
    desk.now_s += 10
    desk.hello("c", START)
    assert desk.names == ["a", "c"]
    assert WaitFor("") in desk.actions


def test_a_newcomer_must_be_heard_of() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.vote("a")
    desk.hello("c", START, prepared=Outcome(1, "d"))
    desk.wait(2, "a", "b")
    desk.vote("b")
    assert desk.names == ["a", "b"], "c was ready, and has been silent since"


def test_a_newcomer_that_goes_before_it_is_in_is_forgotten() -> None:
    desk = Desk()
    desk.enter("a")
    desk.vote("a")
    desk.hello("b", START)
    desk.happen(Disconnected(worker("b")))
    assert list(desk.state.members) == ["a"]
    assert desk.epoch.reason == "a joined"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (Facts("other", "0.1.0", "config"), "a has run other, and this run has run:"),
        (Facts("run", "0.2.0", "config"), "a has program version 0.2.0, and this run has 0.1.0:"),
        (Facts("run", "0.1.0", "changed"), "a has configuration changed, and this run has config:"),
    ],
)
def test_who_would_not_make_the_same_weights_is_refused(facts: Facts, words: str) -> None:
    desk = Desk()
    desk.happen(Hello(worker("a"), "a:1", facts, desk.stand()))
    (refused,) = desk.sent("a")
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(words)
    assert "join with the join string of this run" in refused.reason


def test_a_worker_of_a_later_term_means_two_coordinators() -> None:
    desk = Desk()
    desk.hello("a", epoch=EpochId(4, 1))
    (refused,) = desk.sent("a")
    assert isinstance(refused, Refused)
    assert "a has seen term 4 of this run, and this coordinator is in term 1: there are two" in refused.reason


def test_a_name_is_its_bearers_as_long_as_it_lives() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.hello("b", incarnation="2")
    assert "a worker named b is in this run" in desk.evicted()["b"]
    assert Probe(worker("b"), "b:1") in desk.actions
    desk.happen(Probed(worker("b"), refused=False))
    assert desk.names == ["a", "b"]
    desk.hello("b", incarnation="2")
    desk.happen(Probed(worker("b"), refused=True))
    assert desk.names == ["a"]
    desk.hello("b", incarnation="2")
    assert desk.epoch.seats[1].worker == worker("b", "2")
    desk.hello("b", incarnation="1")
    assert desk.epoch.seats[1].worker == worker("b", "2"), "the old one stays out"


def test_a_bearer_of_a_name_that_is_silent_gives_way() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.wait(SILENCE_S, "a")
    desk.hello("b", incarnation="2")
    assert desk.evicted() == {"b": "another process of that name has come while it was silent"}
    assert desk.epoch.seats[1].worker == worker("b", "2")


def test_one_that_has_prepared_what_the_others_took_is_told_and_needs_no_transfer() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.vote("a")
    desk.vote("b")
    desk.happen(Report(worker("a"), desk.stand(START, epoch=desk.epoch.id, prepared=Outcome(1, "d"))))
    assert desk.sent("a") == [Commit(Outcome(1, "d"), desk.epoch.id, (1.0, 1.0))]


def test_the_shares_follow_the_speeds() -> None:
    desk = Desk()
    desk.hello("a", speed=4.0)
    desk.hello("b", speed=2.0)
    desk.hello("c")
    assert [seat.weight for seat in desk.epoch.seats] == [1.33, 0.667, 1.0]
    for name, speed in (("a", 2.0), ("b", 2.0), ("c", 2.0)):
        desk.report(name, epoch=desk.epoch.id, prepared=Outcome(1, "d"), speed=speed)
    assert desk.journal[-1] == CommitRecord(Outcome(1, "d"), (1.0, 1.0, 1.0))
    even = Desk(replace(RULES, share="even"))
    even.hello("a", speed=4.0)
    even.hello("b", speed=2.0)
    assert [seat.weight for seat in even.epoch.seats] == [1.0, 1.0]


def test_the_end_is_when_all_have_left() -> None:
    desk = Desk(replace(RULES, num_steps=1))
    desk.enter("a", "b")
    desk.vote("a")
    desk.vote("b")
    assert desk.state.finished
    desk.happen(Disconnected(worker("a")))
    desk.happen(Probed(worker("a"), refused=False))
    desk.happen(Leave(worker("b"), "done"))
    assert End("all steps are taken", failed=False) not in desk.actions
    desk.wait(SILENCE_S)
    assert End("all steps are taken", failed=False) in desk.actions


def test_who_has_not_got_the_last_state_when_all_others_have_left_is_told_so() -> None:
    desk = Desk(replace(RULES, num_steps=1))
    desk.enter("a", "b")
    desk.hello("late", NOTHING)
    desk.vote("a")
    desk.vote("b")
    desk.happen(Leave(worker("a"), "its work is done"))
    assert desk.state.ended is None, "b can give it"
    desk.happen(Leave(worker("b"), "its work is done"))
    assert desk.sent("late") == [Refused("this run is over: all steps are taken, by workers that have left")]
    assert desk.actions[-1] == End("all steps are taken", failed=False)
