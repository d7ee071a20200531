"""A worker is cut off when the run ends: it is waited for, though not for ever, and told how the run has ended."""

from __future__ import annotations

from dataclasses import replace

from elastic_desk import RULES, Desk, worker

from mlx_distributed.elastic.protocol import NOTHING, End, Ended, Leave, Outcome, Refused, WaitFor
from mlx_distributed.elastic.state import RETURN_S, SILENCE_S


def finished_without_c() -> Desk:
    """`c` falls silent in the last step, which the others take; both have left."""
    desk = Desk(replace(RULES, num_steps=2, wait_s=5.0))
    desk.enter("a", "b", "c")
    for name in "abc":
        desk.vote(name)
    desk.confirm()
    desk.vote("a")
    desk.wait(SILENCE_S + 0.1, "a", "b")
    assert desk.names == ["a", "b"]
    for name in "ab":
        desk.vote(name)
    for name in "ab":
        desk.happen(Leave(worker(name), "its work is done"))
    return desk


def test_who_is_cut_off_when_the_run_ends_is_waited_for_and_told() -> None:
    desk = finished_without_c()
    reason = f"all steps are taken; waiting up to {RETURN_S:g} s for c, cut off before the end"
    assert desk.actions == (WaitFor(reason),)
    desk.wait(20.0)
    assert desk.actions == (), "for longer than for workers to train with"
    desk.hello("late", NOTHING)
    assert desk.sent("late") == [Refused("this run is over: all steps are taken, by workers that have left")]
    assert desk.state.ended is None
    desk.hello("c", Outcome(1, "d"), prepared=Outcome(2, "e"))
    over = Ended("all steps are taken, and the model is in the output folder of worker a", failed=False)
    assert desk.sent("c") == [over]
    assert desk.actions[-1] == End("all steps are taken", failed=False)
    desk.hello("c", Outcome(1, "d"))
    assert desk.sent("c") == [over], "the first word may be lost"


def test_who_is_cut_off_is_not_waited_for_for_ever() -> None:
    desk = finished_without_c()
    desk.wait(RETURN_S)
    assert desk.actions == (End("all steps are taken", failed=False),)
