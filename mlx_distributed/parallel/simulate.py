"""What a schedule takes: the timeline of a step, idle time and memory, from measured durations and no device."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.schedule import COMPUTE, Action, Schedule
from mlx_distributed.parallel.validate import count_in_flight, lower, run_order


@dataclass(frozen=True)
class StageCosts:
    """Of one stage and one micro-batch, on the worker that has the stage."""

    forward_s: float
    """F."""
    backward_s: float
    """B alone: gradients of the input."""
    weight_s: float
    """W. Where the backward pass is not split, B takes `backward_s + weight_s`."""
    split_s: float = 0.0
    """What B takes longer if W is left for later."""
    activation_bytes: int = 0
    """Held from the begin of F to the end of B."""
    residual_bytes: int = 0
    """Held from the end of B to the end of W. While B runs, the larger of the two is held."""


@dataclass(frozen=True)
class Costs:
    """Of all stages of a model and of the links between the workers."""

    stages: tuple[StageCosts, ...]
    """From the first stage of the model to the last."""
    link_s: tuple[float, ...]
    """What a message takes on the link of workers w and w + 1, by w, in both directions at the same time. One more is
    of the link of the last worker and the first, which only an interleaved schedule of three or more workers uses."""


class Span(NamedTuple):
    """An action of computing, in seconds from the begin of the step."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """A step as it would run. Each tuple is by worker."""

    timeline: tuple[tuple[Span, ...], ...]
    step_s: float
    """From the begin of the first action to the end of the last one, of all workers."""
    busy_s: tuple[float, ...]
    in_flight: tuple[int, ...]
    """Counted (see `Schedule.in_flight`)."""
    peak_bytes: tuple[int, ...]
    """Of what is held for backward passes. Received messages that nobody has asked for yet are the transport's."""

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the step that each worker waits."""
        return tuple(1 - busy_s / self.step_s if self.step_s else 0.0 for busy_s in self.busy_s)

    @property
    def efficiency(self) -> float:
        """Share of the time of all workers that is work."""
        return 1 - sum(self.idle) / len(self.busy_s)


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run a valid schedule on paper.

    A send takes its worker no time and its link `link_s`, one message after the other. A receive waits for it.

    Raises:
        ConfigError: there are not costs for as many stages and links as the schedule has, or it hangs.
    """
    _check_costs(schedule, costs)
    lowered = lower(schedule)
    num_workers = schedule.num_workers
    durations = [_durations(stage, schedule.split_backward) for stage in costs.stages]
    timeline: list[list[Span]] = [[] for _ in range(num_workers)]
    now_s = [0.0] * num_workers
    link_free_s: dict[tuple[int, int], float] = {}
    arrivals_s: dict[tuple[int, int], deque[float]] = defaultdict(deque)  # By link, as `link_free_s`: sender, receiver.
    for worker, action in run_order(lowered):
        kind, stage, _ = action
        if kind in COMPUTE:
            start_s = now_s[worker]
            now_s[worker] = start_s + durations[stage][kind]
            timeline[worker].append(Span(action, start_s, now_s[worker]))
        elif kind in ("SEND_F", "SEND_B"):
            receiver = lowered.worker_of(stage + (1 if kind == "SEND_F" else -1))
            link = worker, receiver
            left_s = max(now_s[worker], link_free_s.get(link, 0.0))
            link_free_s[link] = left_s + costs.link_s[_pair(worker, receiver)]
            arrivals_s[link].append(link_free_s[link])
        else:
            sender = lowered.worker_of(stage + (-1 if kind == "RECV_F" else 1))
            now_s[worker] = max(now_s[worker], arrivals_s[sender, worker].popleft())
    return Simulation(
        timeline=tuple(map(tuple, timeline)),
        step_s=max(now_s),
        busy_s=tuple(sum(span.end_s - span.start_s for span in spans) for spans in timeline),
        in_flight=count_in_flight(schedule),
        peak_bytes=tuple(_peak_bytes(actions, costs.stages, schedule.split_backward) for actions in schedule.actions),
    )


def _durations(stage: StageCosts, split: bool) -> dict[str, float]:
    if split:
        return {"F": stage.forward_s, "B": stage.backward_s + stage.split_s, "W": stage.weight_s}
    return {"F": stage.forward_s, "B": stage.backward_s + stage.weight_s}


def _pair(worker: int, other: int) -> int:
    """Index of the link between two workers, of which one comes after the other or the first after the last."""
    return min(worker, other) if abs(worker - other) == 1 else max(worker, other)


def _peak_bytes(actions: Sequence[Action], stages: Sequence[StageCosts], split: bool) -> int:
    held = peak = 0
    for kind, stage, _ in actions:
        if kind == "F":
            held += stages[stage].activation_bytes
        elif kind == "B" and split:
            during = max(stages[stage].activation_bytes, stages[stage].residual_bytes)
            held += during - stages[stage].activation_bytes
            peak = max(peak, held)
            held += stages[stage].residual_bytes - during
        elif kind == "B":
            held -= stages[stage].activation_bytes
        elif kind == "W":
            held -= stages[stage].residual_bytes
        peak = max(peak, held)
    return peak


def _check_costs(schedule: Schedule, costs: Costs) -> None:
    if len(costs.stages) != schedule.num_stages:
        raise ConfigError(
            f"schedule {schedule.name} has {schedule.num_stages} stages, and there are costs of {len(costs.stages)}"
        )
    num_links = schedule.num_workers - 1
    if schedule.num_chunks > 1 and schedule.num_workers > 2:
        num_links += 1
    if len(costs.link_s) < num_links:
        raise ConfigError(
            f"schedule {schedule.name} uses {num_links} links, and there are times of {len(costs.link_s)}"
        )
