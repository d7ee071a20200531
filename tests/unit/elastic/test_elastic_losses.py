"""Who is given up, and who is not: silence, broken connections, slowness."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_desk import RULES, Desk, worker

from mlx_distributed.elastic.protocol import START, Disconnected, Loss, Outcome, Probe, Probed, Tick
from mlx_distributed.elastic.state import APART_S, BARRED_S, MAX_BARRED_S, SILENCE_S


def test_silence_alone_is_no_reason() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.wait(60)
    assert desk.evicted() == {}


def test_of_the_silent_only_those_go_that_are_waited_for() -> None:
    desk = Desk()
    desk.enter("a", "b", "c", "d")
    desk.report("a", epoch=desk.epoch.id, waiting_for=("b",))
    desk.wait(SILENCE_S + 0.2, "a")
    assert list(desk.evicted()) == ["b"], "nobody waits for c and d"
    desk.wait(60, "a")
    assert desk.evicted() == {}


@pytest.mark.parametrize("found", ["refused", "silent"])
def test_votes_of_the_survivors_count_in_an_epoch_of_their_own_only(found: str) -> None:
    """Whether the one that died had voted too, and the others have its part, nobody can say: the sum is made anew."""
    desk = Desk()
    desk.enter("a", "b", "c")
    desk.vote("a", "old")
    desk.vote("c", "old")
    desk.happen(Disconnected(worker("b")))
    desk.happen(Probed(worker("b"), refused=found == "refused"))
    desk.wait(SILENCE_S + 0.2, "a", "c")
    assert desk.state.committed == START
    assert desk.names == ["a", "c"]
    desk.vote("a", "new")
    assert desk.state.committed == START
    desk.vote("c", "new")
    assert desk.state.committed == Outcome(1, "new")


def test_votes_of_the_survivors_do_not_count_while_they_are_too_few() -> None:
    desk = Desk(replace(RULES, min_workers=3))
    desk.enter("a", "b", "c")
    desk.vote("a")
    desk.vote("c")
    desk.happen(Disconnected(worker("b")))
    desk.happen(Probed(worker("b"), refused=True))
    for name in "ac":
        desk.vote(name)
    assert desk.state.committed == START


@pytest.mark.parametrize("how", ["waits in the collective", "has voted", "collective failed"])
def test_silence_of_one_that_is_waited_for_is(how: str) -> None:
    desk = Desk()
    desk.enter("a", "b")
    match how:
        case "waits in the collective":
            desk.report("a", epoch=desk.epoch.id, waiting_for=("b",))
        case "has voted":
            desk.vote("a")
        case _:
            desk.report("a", epoch=desk.epoch.id, lost=Loss("b", "no answer"))
            assert Probe(worker("b"), "b:1") in desk.actions
            desk.happen(Probed(worker("b"), refused=False))
    desk.wait(SILENCE_S - 0.2, "a")
    assert desk.evicted() == {}, "a hiccup"
    desk.wait(0.4, "a")
    assert desk.evicted() == {"b": "it was silent for 3.0 s while others waited for it"}
    assert desk.names == ["a"]


def test_patience_is_learnt_from_the_steps() -> None:
    desk = Desk()
    desk.enter("a", "b")
    for length_s in (10, 12, 11, 10, 11):
        desk.wait(length_s, "a", "b")
        desk.vote("a")
        desk.vote("b")
    assert desk.state.committed.step == 5
    assert desk.state.patience_s() == pytest.approx(16)
    desk.vote("a")
    desk.wait(15, "a")
    assert desk.evicted() == {}
    desk.wait(2, "a")
    assert list(desk.evicted()) == ["b"]


def test_the_absence_of_the_coordinator_is_nobodys_silence() -> None:
    desk = Desk(replace(RULES, vote_s=20.0))
    desk.enter("a", "b")
    desk.vote("a")
    desk.happen(Tick(), after_s=3600)
    assert desk.evicted() == {}
    desk.wait(SILENCE_S, "a")
    assert list(desk.evicted()) == ["b"]


def test_one_that_is_alive_and_never_finishes_goes_in_the_end() -> None:
    desk = Desk(replace(RULES, vote_s=30.0))
    desk.enter("a", "b")
    desk.vote("a")
    desk.wait(29.5, "a", "b")
    assert desk.evicted() == {}
    desk.wait(1, "a")
    assert desk.evicted() == {"b": "it had no result 30 s after others had theirs"}


def test_a_connection_that_breaks_between_the_living_is_tried_once_more_then_one_goes() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    for attempt in (1, 2):
        desk.confirm()
        desk.report("a", epoch=desk.epoch.id, lost=Loss("c", "reset by peer"))
        desk.report("b", epoch=desk.epoch.id)
        desk.happen(Probed(worker("c"), refused=False))
        assert desk.names == ["a", "b", "c"], "not heard yet"
        desk.beat("c")
        if attempt == 1:
            assert desk.names == ["a", "b", "c"]
            assert desk.epoch.reason == "a and c do not reach each other (reset by peer)"
    assert desk.names == ["a", "b"]
    assert desk.evicted() == {"c": "a and c do not reach each other (reset by peer); it may come back in 60 s"}
    desk.hello("c")
    assert desk.names == ["a", "b"]
    desk.now_s += BARRED_S
    desk.report("c")
    assert desk.names == ["a", "b", "c"]


def test_who_is_in_trouble_with_more_of_the_others_goes() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    for name in "bcbc":
        if "a" in desk.names:
            desk.confirm()
            desk.report(name, epoch=desk.epoch.id, lost=Loss("a", "reset"))
            desk.happen(Probed(worker("a"), refused=False))
            desk.beat("a")
    assert desk.names == ["b", "c"]


def test_a_worker_whose_own_collective_fails_twice_goes() -> None:
    desk = Desk()
    desk.enter("a", "b")
    for _ in range(2):
        desk.confirm()
        desk.report("b", epoch=desk.epoch.id, lost=Loss("b", "no memory"))
    assert desk.evicted()["b"].startswith("b cannot go on (no memory)")


def wait_for_each_other(desk: Desk, **waiting_for: str) -> None:
    """Members name those that they wait for, and are well."""
    desk.confirm()
    epoch = desk.epoch.id
    for name, others in waiting_for.items():
        desk.report(name, epoch=epoch, waiting_for=tuple(others))
    desk.wait(APART_S - 0.2, *desk.names)
    assert desk.epoch.id == epoch
    desk.happen(Tick(), after_s=0.4)
    assert desk.epoch.id > epoch


def test_two_that_wait_for_each_other_try_again_and_then_the_later_one_goes() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    wait_for_each_other(desk, a="c", c="a")
    assert desk.names == ["a", "b", "c"]
    assert desk.epoch.reason == "a and c do not reach each other (nothing has come through for 6.2 s)"
    wait_for_each_other(desk, a="c", c="a")
    assert desk.names == ["a", "b"]
    assert list(desk.evicted()) == ["c"]


def test_one_that_has_voted_has_nothing_more_to_send() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    desk.vote("c")
    desk.vote("b")
    desk.report("a", epoch=desk.epoch.id, waiting_for=("b",))
    desk.wait(APART_S + 0.2, "a", "b", "c")
    assert desk.epoch.reason.startswith("a and b do not reach each other")


def test_one_that_is_waited_for_and_waits_for_nobody_is_slow() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    for name in "ab":
        desk.report(name, epoch=desk.epoch.id, waiting_for=("c",))
    first = desk.epoch.id
    desk.wait(60, "a", "b", "c")
    assert desk.epoch.id == first


def test_a_wait_that_is_over_now_and_then_is_a_slow_link() -> None:
    desk = Desk()
    desk.enter("a", "b")
    first = desk.epoch.id
    for _ in range(5):
        for others in (("b",), ()):
            desk.report("a", epoch=first, waiting_for=others)
            desk.report("b", epoch=first, waiting_for=("a",))
            desk.wait(APART_S - 1, "a", "b")
    assert desk.epoch.id == first


def test_the_absence_of_the_coordinator_parts_nobody() -> None:
    desk = Desk()
    desk.enter("a", "b")
    first = desk.epoch.id
    desk.report("a", epoch=first, waiting_for=("b",))
    desk.report("b", epoch=first, waiting_for=("a",))
    desk.wait(1, "a", "b")
    desk.happen(Tick(), after_s=3600)
    desk.wait(1, "a", "b")
    assert desk.epoch.id == first


def test_who_reaches_nobody_goes_though_it_came_first() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    for _ in range(2):
        wait_for_each_other(desk, a="bc", b="a", c="a")
    assert desk.names == ["b", "c"]
    assert list(desk.evicted()) == ["a"]


def test_a_link_that_stays_cut_costs_less_and_less() -> None:
    desk = Desk()
    desk.enter("a", "b", "c")
    lengths_s, length_s = [], BARRED_S
    while length_s < MAX_BARRED_S:
        for _ in range(2):
            wait_for_each_other(desk, a="c", c="a")
        assert desk.names == ["a", "b"]
        desk.confirm()
        desk.vote("a")
        desk.vote("b")
        lengths_s.append(length_s := desk.state.barred["c"].length_s)
        desk.now_s += length_s
        desk.hello("c")
        assert desk.names == ["a", "b", "c"]
    assert lengths_s == [60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3840.0]
