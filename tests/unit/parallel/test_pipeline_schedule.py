from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_schedules import schedules

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zb_h1, zero_bubble
from mlx_distributed.parallel.schedule import Action, Schedule
from mlx_distributed.parallel.validate import count_in_flight, lower, run_order, validate


@settings(deadline=None)
@given(schedules())
def test_every_schedule_is_valid_and_holds_what_it_promises(schedule: Schedule) -> None:
    validate(schedule)
    counted = count_in_flight(schedule)
    if schedule.name == "interleaved":  # A last group that is not full holds less.
        assert all(held <= promised for held, promised in zip(counted, schedule.in_flight, strict=True))
    if schedule.name != "interleaved" or schedule.num_microbatches % schedule.num_workers == 0:
        assert counted == schedule.in_flight


@settings(deadline=None)
@given(schedules())
def test_gradients_of_a_stage_come_in_the_order_of_the_micro_batches(schedule: Schedule) -> None:
    """So that they are added in one order, whatever the schedule."""
    for actions in schedule.actions:
        for stage in {action.stage for action in actions}:
            for kind in schedule.kinds:
                order = [action.microbatch for action in actions if (action.kind, action.stage) == (kind, stage)]
                assert order == list(range(schedule.num_microbatches))


@settings(deadline=None)
@given(schedules())
def test_what_is_printed_is_read_back(schedule: Schedule) -> None:
    for each in (schedule, lower(schedule)):
        assert Schedule.read(str(each)) == each


@settings(deadline=None)
@given(schedules())
def test_a_lowered_schedule_is_valid(schedule: Schedule) -> None:
    lowered = lower(schedule)
    validate(lowered)
    assert lower(lowered) == lowered
    assert lowered.is_lowered == (schedule.num_workers > 1)
    assert count_in_flight(lowered) == count_in_flight(schedule)
    computed = [[action for action in actions if action.kind in schedule.kinds] for actions in lowered.actions]
    assert computed == [list(actions) for actions in schedule.actions]


@settings(deadline=None, max_examples=200)
@given(schedules(), st.data())
def test_what_passes_can_be_run_and_what_is_refused_cannot(schedule: Schedule, data: st.DataObject) -> None:
    """Two actions of a worker are swapped, and the result is run by trying, which knows nothing of messages."""
    worker = data.draw(st.integers(0, schedule.num_workers - 1))
    actions = list(schedule.actions[worker])
    first, second = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    actions[first], actions[second] = actions[second], actions[first]
    changed = replace(
        schedule,
        actions=(*schedule.actions[:worker], tuple(actions), *schedule.actions[worker + 1 :]),
        in_flight=(10**6,) * schedule.num_workers,
    )
    if can_run(changed):
        validate(changed)
    else:
        with pytest.raises(ConfigError, match=r"needs|hangs"):
            validate(changed)


def can_run(schedule: Schedule) -> bool:
    """By trying, round after round, whether some worker can do its next action."""
    todo = [list(actions) for actions in schedule.actions]
    done: set[tuple[str, int, int]] = set()
    going = True
    while going:
        going = False
        for actions in todo:
            while actions:
                kind, stage, microbatch = actions[0]
                needs = {
                    "F": {("F", stage - 1, microbatch)} if stage else set(),
                    "B": {("F", stage, microbatch)}
                    | ({("B", stage + 1, microbatch)} if stage < schedule.num_stages - 1 else set()),
                    "W": {("B", stage, microbatch)},
                }[kind]
                if not needs <= done:
                    break
                done.add(tuple(actions.pop(0)))
                going = True
    return not any(todo)


def test_what_a_schedule_looks_like() -> None:
    assert str(one_f_one_b(2, 3)) == (
        "1f1b num_workers=2 num_chunks=1 num_microbatches=3 split_backward=false in_flight=2,1\n"
        "0F0 0F1 0B0 0F2 0B1 0B2\n"
        "1F0 1B0 1F1 1B1 1F2 1B2\n"
    )
    assert str(zb_h1(2, 3)).splitlines()[1:] == [
        "0F0 0F1 0B0 0W0 0F2 0B1 0W1 0B2 0W2",
        "1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1W2",
    ]
    assert str(lower(interleaved(2, 1, 2))).splitlines()[1:] == [
        "0F0 0SEND_F0 2RECV_F0 2F0 2SEND_F0 2RECV_B0 2B0 2SEND_B0 0RECV_B0 0B0",
        "1RECV_F0 1F0 1SEND_F0 3RECV_F0 3F0 3B0 3SEND_B0 1RECV_B0 1B0 1SEND_B0",
    ]


def test_one_stage_is_one_after_the_other() -> None:
    assert str(one_f_one_b(1, 2)).splitlines()[1] == "0F0 0B0 0F1 0B1"
    assert str(zb_h1(1, 2)).splitlines()[1] == "0F0 0B0 0W0 0F1 0B1 0W1"
    assert str(gpipe(1, 2)).splitlines()[1] == "0F0 0F1 0B0 0B1"


def test_a_message_that_comes_early_is_received_in_its_turn() -> None:
    """Worker 0 sends micro-batch 1 first and worker 1 wants it last."""
    text = (
        "own num_workers=2 num_chunks=1 num_microbatches=2 split_backward=false in_flight=2,2\n"
        "0F1 0F0 0B0 0B1\n"
        "1F0 1F1 1B0 1B1\n"
    )
    schedule = Schedule.read(text)
    validate(schedule)
    lowered = str(lower(schedule))
    assert lowered.splitlines()[2].startswith("1RECV_F1 1RECV_F0 1F0 1F1")
    with pytest.raises(
        ConfigError, match=r"worker 1, action 0 \(1RECV_F0\) takes the message of 0SEND_F0, but .* 0SEND_F1"
    ):
        validate(Schedule.read(lowered.replace("1RECV_F1 1RECV_F0", "1RECV_F0 1RECV_F1")))


def test_every_action_comes_after_what_it_waits_for() -> None:
    lowered = lower(interleaved(3, 7, 2))
    order = [action for _, action in run_order(lowered)]
    assert sorted(order) == sorted(action for actions in lowered.actions for action in actions)
    place = {action: index for index, action in enumerate(order)}
    for action in order:
        if action.kind == "RECV_B":
            assert place[Action("SEND_B", action.stage + 1, action.microbatch)] < place[action]


HEADER = "1f1b num_workers=2 num_chunks=1 num_microbatches=1 split_backward=false in_flight=1,1"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a schedule begins with its name"),
        ("1f1b num_workers=2\n0F0", "a schedule begins with its name"),
        (HEADER.replace("=2", "=two"), "num_workers=two of a schedule"),
        (HEADER.replace("=1,1", "=1,0"), "in_flight=0 of a schedule"),
        (HEADER.replace("false", "no"), "split_backward=no"),
        (f"{HEADER}\n0F0 0B0", "there are 1 lines and 2 numbers"),
        (f"{HEADER}\n0F0 0B0\n1F0 1X0", r"worker 1, action 1 \(1X0\)"),
        (f"{HEADER}\n0F0 0B0\n1F0 1B0 1W0", r"worker 1, action 2 \(1W0\) does not belong"),
        (f"{HEADER}\n0F0 0B0\n1F0 1B0 0F0", r"worker 1, action 2 \(0F0\) does not belong"),
        (f"{HEADER}\n0F0 0B0\n1F0 1B0 1B0", r"worker 1, action 1 \(1B0\) is there 2 times"),
        (f"{HEADER}\n0F0 0B0\n1F0", "worker 1 has no 1B0"),
        (f"{HEADER}\n0B0 0F0\n1F0 1B0", r"worker 0, action 0 \(0B0\) comes before 0F0"),
        (f"{HEADER}\n0F0 0SEND_F0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0", r"\(0B0\) comes before 0RECV_B0"),
        (f"{HEADER}\n0F0 0RECV_B0 0B0 0SEND_F0\n1RECV_F0 1F0 1B0 1SEND_B0", r"hangs.* 0, action 1 \(0RECV_B0\) waits"),
        (f"{HEADER.replace('microbatches=1', 'microbatches=2')}\n0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", "worker 0 holds 2"),
        (
            f"{HEADER.replace('microbatches=1', 'microbatches=2')}\n0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1",
            r"hangs.* worker 0, action 2 \(0RECV_B0\) waits for 1SEND_B0 of worker 1; worker 1, action",
        ),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_cell(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validate(Schedule.read(text))


def test_numbers_of_a_builder_are_checked() -> None:
    with pytest.raises(ConfigError, match="num_workers=0"):
        gpipe(0, 4)
    with pytest.raises(ConfigError, match="num_microbatches=0"):
        zb_h1(2, 0)
    with pytest.raises(ConfigError, match="num_chunks=0"):
        interleaved(2, 4, 0)
    with pytest.raises(ConfigError, match=r"in_flight=2,1 .* each of the 3 workers"):
        one_f_one_b(3, 4, [2, 1])
    with pytest.raises(ConfigError, match="in_flight=2,0"):
        one_f_one_b(2, 4, [2, 0])
    with pytest.raises(ConfigError, match=r"in_flight=1,1 .* warm_up=2,1"):
        zero_bubble(2, 4, [2, 1], [1, 1])
