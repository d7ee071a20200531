"""Who is given up, and who is not: silence, broken connections, slowness."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_desk import RULES, Desk, worker

from mlx_distributed.elastic.protocol import Loss, Probe, Probed, Tick
from mlx_distributed.elastic.state import BARRED_S, SILENCE_S


def test_silence_alone_is_no_reason() -> None:
    desk = Desk()
    desk.enter("a", "b")
    desk.wait(60)
    assert desk.evicted() == {}


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
