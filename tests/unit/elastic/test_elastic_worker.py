"""A worker's side of the protocol, and its words on the wire."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mlx_distributed.comm._pb import membership_pb2 as pb
from mlx_distributed.elastic.messages import (
    arrival_from_pb,
    arrival_to_pb,
    message_from_pb,
    message_to_pb,
    standing_from_pb,
)
from mlx_distributed.elastic.protocol import (
    NOTHING,
    START,
    Commit,
    Ended,
    Enter,
    Epoch,
    EpochId,
    Evicted,
    Facts,
    Fetch,
    Hello,
    Loss,
    Message,
    Outcome,
    Refused,
    Seat,
    Standing,
    WorkerId,
)
from mlx_distributed.elastic.worker import View

ME, OTHER = WorkerId("me", "1"), WorkerId("other", "1")
FIRST = EpochId(1, 1)
EPOCH = Epoch(FIRST, START, (Seat(ME, "me:1", 1.0, 1.2e8), Seat(OTHER, "other:1", 1.0)), "training begins")
AT_WORK = View(ME).receive(1, Enter(EPOCH))
ONE = Outcome(1, "d")
COMMIT = Commit(ONE, FIRST, (1.5, 0.5))


def test_it_enters_votes_and_takes_the_step_when_told() -> None:
    assert AT_WORK.epoch == EPOCH
    view = AT_WORK.prepare(FIRST, "d")
    assert view.standing(7, 2.5) == Standing(7, START, FIRST, ONE, 2.5)
    view = view.receive(1, COMMIT)
    assert (view.committed, view.prepared) == (ONE, None)
    assert view.epoch is not None
    assert view.epoch.committed == ONE
    assert [seat.weight for seat in view.epoch.seats] == [1.5, 0.5]
    assert view.receive(1, COMMIT) == view, "told twice"


@pytest.mark.parametrize(
    "view", [AT_WORK, AT_WORK.prepare(FIRST, "other"), View(ME), replace(AT_WORK, committed=NOTHING)]
)
def test_it_takes_only_what_it_has_prepared(view: View) -> None:
    assert view.receive(1, COMMIT).committed == view.committed


def test_what_it_prepared_before_it_was_given_up_is_taken_if_the_others_took_it() -> None:
    view = AT_WORK.prepare(FIRST, "d").receive(1, Evicted("silent"))
    assert (view.epoch, view.out, view.prepared) == (None, "silent", ONE)
    assert view.receive(2, replace(COMMIT, epoch=EpochId(2, 5))).committed == ONE


def test_state_that_is_not_to_be_trusted_is_forgotten() -> None:
    view = AT_WORK.prepare(FIRST, "d").receive(1, Evicted("another gradient", must_fetch=True))
    assert (view.committed, view.prepared) == (NOTHING, None)
    offer = Fetch(ONE, ("other:1",))
    view = view.receive(1, offer)
    assert view.offer == offer
    view = view.fetched(ONE)
    assert (view.committed, view.offer) == (ONE, None)


def test_a_lower_term_is_not_obeyed() -> None:
    view = AT_WORK.receive(3, Fetch(START, ()))
    for message in (COMMIT, Evicted("x"), Ended("x", True), Enter(replace(EPOCH, id=EpochId(1, 9)))):
        assert view.receive(2, message) == view


@pytest.mark.parametrize(
    "epoch",
    [
        replace(EPOCH, id=EpochId(0, 9)),
        replace(EPOCH, id=EpochId(1, 2), committed=ONE),
        replace(EPOCH, id=EpochId(1, 2), seats=EPOCH.seats[1:]),
        replace(EPOCH, id=EpochId(1, 2), seats=(Seat(WorkerId("me", "0"), "me:1", 1.0),)),
        EPOCH,
    ],
    ids=["older", "a commit is missing", "not in it", "another process", "the same"],
)
def test_an_epoch_that_is_not_for_it_is_not_entered(epoch: Epoch) -> None:
    view = AT_WORK.prepare(FIRST, "d")
    assert view.receive(1, Enter(epoch)) == view


def test_a_new_epoch_makes_a_vote_void() -> None:
    view = AT_WORK.prepare(FIRST, "d").suspect(FIRST, ("other",), Loss("other", "reset"))
    assert view.standing(1).waiting_for == ("other",)
    view = view.receive(1, Enter(replace(EPOCH, id=EpochId(1, 2))))
    assert view.standing(2) == Standing(2, START, EpochId(1, 2))
    assert view.prepare(FIRST, "late") == view
    assert view.suspect(FIRST, ("late",)) == view


def test_an_offer_of_state_that_is_late_is_passed_over() -> None:
    assert AT_WORK.receive(1, Fetch(NOTHING, ("other:1",))) == AT_WORK
    assert AT_WORK.receive(2, Fetch(ONE, ("other:1",))).offer is not None
    assert View(ME).receive(1, Fetch(START, ("other:1",))).offer is None


def test_an_offer_of_a_later_state_says_that_the_others_have_gone_on() -> None:
    """The connection was lost with the word that this worker is out."""
    offer = Fetch(Outcome(2, "e"), ("other:1",))
    view = AT_WORK.prepare(FIRST, "d").receive(1, offer)
    assert (view.epoch, view.offer, view.prepared) == (None, offer, ONE)


@pytest.mark.parametrize("over", [Refused("over"), Ended("over", failed=False)])
def test_when_the_run_is_over_nothing_is_fetched_any_more(over: Message) -> None:
    view = View(ME).receive(1, Fetch(ONE, ("other:1",))).receive(1, over)
    assert (view.ended, view.offer) == (over, None)


MESSAGES: list[Message] = [
    COMMIT,
    Enter(EPOCH),
    Fetch(ONE, ("a:1", "b:1")),
    Evicted("why", must_fetch=True),
    Refused("why"),
    Ended("why", failed=True),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_come_back_as_they_were(message: Message) -> None:
    data = message_to_pb(3, message).SerializeToString()
    received = pb.FromCoordinator.FromString(data)
    assert (received.term, message_from_pb(received)) == (3, message)


@pytest.mark.parametrize(
    "standing",
    [
        Standing(0, NOTHING),
        Standing(2**40, ONE, EpochId(2**40, 3), Outcome(2, "e"), 1.5, ("a", "b"), Loss("a", "x"), 1.2e8, 0.004),
    ],
)
def test_a_hello_comes_back_as_it_was(standing: Standing) -> None:
    hello = Hello(ME, "me:1", Facts("run", "0.1.0", "config"), standing)
    data = arrival_to_pb(hello).SerializeToString()
    assert arrival_from_pb(pb.FromWorker.FromString(data).arrival) == hello


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        message_from_pb(pb.FromCoordinator(term=1))
    with pytest.raises(ValueError, match="name"):
        arrival_from_pb(pb.Arrival(name="a"))
    for speed in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="speed"):
            standing_from_pb(pb.Standing(speed=speed))
        with pytest.raises(ValueError, match="bandwidth"):
            standing_from_pb(pb.Standing(bandwidth=speed))
        with pytest.raises(ValueError, match="round trip"):
            standing_from_pb(pb.Standing(round_trip_s=speed))
