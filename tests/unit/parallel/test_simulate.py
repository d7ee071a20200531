from __future__ import annotations

import heapq
import time
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_schedules import candidates, schedules

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zb_h1, zero_bubble
from mlx_distributed.parallel.choose import TIE, choose
from mlx_distributed.parallel.schedule import Action, Schedule
from mlx_distributed.parallel.simulate import Costs, StageCosts, simulate
from mlx_distributed.parallel.validate import validate

FOUR = [10**9] * 4


def equal_costs(link_s: float, num_workers: int = 4, num_chunks: int = 1, activation_bytes: int = 0) -> Costs:
    """F, B and W of one second per worker."""
    stage_s = 1 / num_chunks
    stage = StageCosts(stage_s, stage_s, stage_s, 0.0, activation_bytes // num_chunks, activation_bytes // num_chunks)
    return Costs((stage,) * num_workers * num_chunks, (link_s,) * num_workers)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Schedule, Costs]:
    schedule = draw(schedules())
    seconds, sizes = st.integers(0, 8).map(float), st.integers(0, 100)
    stage = st.builds(StageCosts, seconds, seconds, seconds, seconds, sizes, sizes)
    stages = draw(st.lists(stage, min_size=schedule.num_stages, max_size=schedule.num_stages))
    links = draw(st.lists(seconds, min_size=schedule.num_workers, max_size=schedule.num_workers))
    return schedule, Costs(tuple(stages), tuple(links))


def play(schedule: Schedule, costs: Costs) -> list[list[tuple[Action, float, float]]]:
    """A step event by event: workers begin when they are free and what they need is there, lines take one at a time."""
    todo = [deque(actions) for actions in schedule.actions]
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in todo]
    busy = [False] * schedule.num_workers
    there: set[Action] = set()
    lines: dict[tuple[int, int], deque[Action]] = {}
    events: list[tuple[float, int, str, int, Action, tuple[int, int]]] = []
    num_events = 0

    def at(when_s: float, what: str, worker: int, action: Action, line: tuple[int, int] = (0, 0)) -> None:
        nonlocal num_events
        num_events += 1
        heapq.heappush(events, (when_s, num_events, what, worker, action, line))

    def line_s(line: tuple[int, int]) -> float:
        first, second = sorted(line)
        return costs.link_s[first if second == first + 1 else second]

    def begin(worker: int, now_s: float) -> None:
        if busy[worker] or not todo[worker]:
            return
        action = todo[worker][0]
        last = schedule.num_stages - 1
        needs_input = {"F": action.stage > 0, "B": action.stage < last, "W": False}[action.kind]
        if needs_input and action not in there:
            return
        stage = costs.stages[action.stage]
        backward_s = stage.backward_s + (stage.split_s if schedule.split_backward else stage.weight_s)
        taken_s = {"F": stage.forward_s, "B": backward_s, "W": stage.weight_s}[action.kind]
        todo[worker].popleft()
        busy[worker] = True
        spans[worker].append((action, now_s, now_s + taken_s))
        at(now_s + taken_s, "computed", worker, action)

    for worker in range(schedule.num_workers):
        begin(worker, 0.0)
    while events:
        now_s, _, what, worker, action, line = heapq.heappop(events)
        if what == "computed":
            busy[worker] = False
            stage = action.stage + {"F": 1, "B": -1, "W": schedule.num_stages}[action.kind]
            if 0 <= stage < schedule.num_stages:
                message, receiver = action._replace(stage=stage), stage % schedule.num_workers
                if receiver == worker:
                    there.add(message)
                else:
                    queue = lines.setdefault((worker, receiver), deque())
                    queue.append(message)
                    if len(queue) == 1:
                        at(now_s + line_s((worker, receiver)), "arrived", receiver, message, (worker, receiver))
        else:
            there.add(action)
            queue = lines[line]
            queue.popleft()
            if queue:
                at(now_s + line_s(line), "arrived", worker, queue[0], line)
        begin(worker, now_s)
    assert not any(todo)
    return spans


@settings(deadline=None, max_examples=150)
@given(runs())
def test_a_simulation_is_what_happens(run: tuple[Schedule, Costs]) -> None:
    schedule, costs = run
    simulation = simulate(schedule, costs)
    expected = play(schedule, costs)
    assert [[tuple(span) for span in spans] for spans in simulation.timeline] == expected
    assert simulation.step_s == max(end_s for spans in expected for *_, end_s in spans)
    for worker, spans in enumerate(expected):
        assert simulation.busy_s[worker] == sum(end_s - start_s for _, start_s, end_s in spans)
        assert simulation.peak_bytes[worker] == most_held(spans, costs, schedule.split_backward)
    total_s = simulation.step_s * schedule.num_workers
    assert simulation.efficiency == pytest.approx(sum(simulation.busy_s) / total_s if total_s else 1.0)


def most_held(spans: list[tuple[Action, float, float]], costs: Costs, split: bool) -> int:
    """By listing, during each action, all micro-batches whose F has begun."""
    order = [action for action, *_ in spans]
    most = 0
    for now in range(len(order)):
        held = 0
        for action in order[: now + 1]:
            if action.kind == "F":
                stage = costs.stages[action.stage]
                backward = order.index(action._replace(kind="B"))
                weight = order.index(action._replace(kind="W")) if split else backward
                if now < backward or (now == backward and not split):
                    held += stage.activation_bytes
                elif now == backward:
                    held += max(stage.activation_bytes, stage.residual_bytes)
                elif now <= weight:
                    held += stage.residual_bytes
        most = max(most, held)
    return most


# Four equal stages, 16 micro-batches, F = B = W, by link time / F: 0, 0.3, 1, 2.
EFFICIENCIES = [
    (gpipe(4, 16), (0.84, 0.82, 0.76, 0.57)),
    (one_f_one_b(4, 16), (0.84, 0.73, 0.56, 0.42)),
    (one_f_one_b(4, 16, [6, 5, 3, 1]), (0.84, 0.82, 0.68, 0.53)),
    (one_f_one_b(4, 16, [7, 5, 3, 1]), (0.84, 0.82, 0.76, 0.64)),
    (interleaved(4, 16, 2), (0.91, 0.85, 0.64, 0.42)),
    (zb_h1(4, 16), (0.94, 0.88, 0.68, 0.48)),
    (zero_bubble(4, 16, [6, 5, 3, 1], [6] * 4), (0.94, 0.92, 0.79, 0.59)),
    (zero_bubble(4, 16, [7, 5, 3, 1], [7] * 4), (0.94, 0.92, 0.89, 0.73)),
    (zero_bubble(4, 16, [10, 7, 4, 1], [10] * 4), (0.94, 0.92, 0.89, 0.84)),
]


@pytest.mark.parametrize(("schedule", "expected"), EFFICIENCIES, ids=lambda value: getattr(value, "name", ""))
def test_efficiency_by_link_time(schedule: Schedule, expected: tuple[float, ...]) -> None:
    found = [simulate(schedule, equal_costs(link_s, 4, schedule.num_chunks)).efficiency for link_s in (0, 0.3, 1, 2)]
    assert found == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("num_workers", "num_microbatches"), [(1, 3), (3, 3), (4, 16), (8, 20)])
def test_idle_time_is_that_of_the_textbook(num_workers: int, num_microbatches: int) -> None:
    work_s = 3 * num_microbatches
    costs = equal_costs(0, num_workers)
    for schedule in (gpipe(num_workers, num_microbatches), one_f_one_b(num_workers, num_microbatches)):
        assert simulate(schedule, costs).step_s == work_s + 3 * (num_workers - 1)
    assert simulate(zb_h1(num_workers, num_microbatches), costs).step_s == work_s + num_workers - 1
    for num_chunks in (2, 4):
        if num_microbatches % num_workers == 0:
            schedule = interleaved(num_workers, num_microbatches, num_chunks)
            step_s = simulate(schedule, equal_costs(0, num_workers, num_chunks)).step_s
            assert step_s == pytest.approx(work_s + 3 * (num_workers - 1) / num_chunks)


def test_sixty_four_stages_and_512_micro_batches_take_seconds() -> None:
    start_s = time.process_time()
    simulation = simulate(one_f_one_b(64, 512), equal_costs(0.3, 64))
    assert time.process_time() - start_s < 5
    assert simulation.in_flight == tuple(range(64, 0, -1))


@pytest.mark.parametrize(("link_s", "least"), [(0, 0.93), (0.3, 0.92), (1, 0.88), (2, 0.84)])
def test_the_choice_follows_the_links(link_s: float, least: float) -> None:
    costs = {1: equal_costs(link_s), 2: equal_costs(link_s, num_chunks=2)}
    choice = choose(candidates(16, costs, FOUR), costs, FOUR)
    assert choice.simulation.efficiency >= least
    assert choice.schedule.split_backward
    validate(choice.schedule)


@pytest.mark.parametrize(("link_s", "least"), [(0, 0.84), (0.3, 0.80), (1, 0.75), (2, 0.69)])
def test_without_a_split_the_number_in_flight_follows_the_links(link_s: float, least: float) -> None:
    costs = {1: equal_costs(link_s)}
    whole = [schedule for schedule in candidates(16, costs, FOUR) if not schedule.split_backward]
    choice = choose(whole, costs, FOUR)
    assert choice.schedule.name == "1f1b"
    assert choice.simulation.efficiency >= least


def test_chunks_are_chosen_where_links_are_fast_and_a_split_is_dear() -> None:
    stages = (StageCosts(1.0, 1.0, 1.0, split_s=1.0),) * 4
    costs = {1: Costs(stages, (0.0,) * 4), 2: equal_costs(0, num_chunks=2)}
    assert choose(candidates(16, costs, FOUR), costs, FOUR).schedule.name == "interleaved"


@given(
    num_workers=st.integers(1, 4),
    num_microbatches=st.integers(1, 8),
    link_s=st.sampled_from([0.0, 0.5, 3.0]),
    memory=st.lists(st.integers(100, 1000), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_a_choice_fits_and_none_that_fits_is_much_faster(
    num_workers: int, num_microbatches: int, link_s: float, memory: list[int]
) -> None:
    costs, memory = {1: equal_costs(link_s, num_workers, activation_bytes=100)}, memory[:num_workers]
    choice = choose(candidates(num_microbatches, costs, memory), costs, memory)
    validate(choice.schedule)
    assert all(peak <= has for peak, has in zip(choice.simulation.peak_bytes, memory, strict=True))
    for candidate in choice.candidates:
        fits = all(peak <= has for peak, has in zip(candidate.simulation.peak_bytes, memory, strict=True))
        assert fits == (candidate.refusal is None)
        if fits:
            assert choice.simulation.step_s <= candidate.simulation.step_s * (1 + TIE)


def test_a_choice_gives_its_reason() -> None:
    costs = {1: equal_costs(1.0, activation_bytes=10**6)}
    memory = [4 * 10**6] * 4
    reason = choose(candidates(16, costs, memory), costs, memory).reason
    assert reason.startswith("zb_h1 with 4 in flight: a step takes 71 s, and workers are busy 68% of it")
    assert "one of 63 s does not: gpipe" in reason
    assert "lacks 12.0 MB" in reason


def test_nothing_fits() -> None:
    costs = {1: equal_costs(1.0, activation_bytes=10**7)}
    memory = [10**8, 10**8, 4 * 10**6, 10**8]
    with pytest.raises(ConfigError, match=r"no schedule fits: .* 10\.0 MB .* worker 2, .* 4\.0 MB .* lacks 6\.0 MB"):
        choose(candidates(16, costs, memory), costs, memory)


def test_costs_are_of_the_stages_and_links_of_the_schedule() -> None:
    with pytest.raises(ConfigError, match="has 3 stages, and there are costs of 2"):
        simulate(gpipe(3, 1), equal_costs(0, 2))
    three = equal_costs(0, 3).stages
    simulate(gpipe(3, 1), Costs(three, (0.0, 0.0)))
    with pytest.raises(ConfigError, match="uses 3 links, and there are times of 2"):
        simulate(interleaved(3, 1, 2), Costs(three * 2, (0.0, 0.0)))
    simulate(interleaved(2, 3, 2), Costs(three[:2] * 2, (0.0,)))
