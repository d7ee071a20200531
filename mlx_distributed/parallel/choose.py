"""`schedule: auto`: the fastest schedule that fits into the memory of the workers, found by simulating many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.simulate import Costs, Simulation, simulate

TIE = 0.01
"""A step may take so much longer if less memory is held then."""


@dataclass(frozen=True)
class Candidate:
    """A schedule that was considered."""

    schedule: Schedule
    simulation: Simulation
    refusal: str | None
    """Which worker lacks how much memory, if one does."""


@dataclass(frozen=True)
class Choice:
    """The schedule to run, and why."""

    schedule: Schedule
    simulation: Simulation
    reason: str
    candidates: tuple[Candidate, ...]


def choose(schedules: Iterable[Schedule], costs: Mapping[int, Costs], memory_bytes: Sequence[int]) -> Choice:
    """The fastest of these schedules; of those that are not 1 % slower, the one that holds the fewest bytes.

    Args:
        schedules: valid ones.
        costs: by the number of chunks per worker that the model is cut into.
        memory_bytes: by worker, what it has for what is held for backward passes, all else taken off.

    Raises:
        ConfigError: none of them fits; the message says which worker lacks how much.
    """
    considered = []
    for schedule in schedules:
        simulation = simulate(schedule, costs[schedule.num_chunks])
        considered.append(Candidate(schedule, simulation, _refusal(schedule, simulation, memory_bytes)))
    fitting = [candidate for candidate in considered if candidate.refusal is None]
    if not fitting:
        nearest = min(considered, key=lambda candidate: _lack_bytes(candidate.simulation, memory_bytes)[0])
        raise ConfigError(
            f"no schedule fits: {nearest.refusal}; use smaller micro-batches, less context, or more workers"
        )
    fastest_s = min(candidate.simulation.step_s for candidate in fitting)
    best = min(
        (candidate for candidate in fitting if candidate.simulation.step_s <= fastest_s * (1 + TIE)),
        key=lambda candidate: (
            max(candidate.simulation.peak_bytes),
            sum(candidate.simulation.in_flight),
            candidate.simulation.step_s,
        ),
    )
    return Choice(best.schedule, best.simulation, _reason(best, considered), tuple(considered))


def label(schedule: Schedule) -> str:
    """Its name and what tells it from others of that name."""
    if schedule.num_chunks > 1:
        return f"{schedule.name} with {schedule.num_chunks} chunks a worker"
    numbers = schedule.in_flight if len(set(schedule.in_flight)) > 1 else schedule.in_flight[:1]
    return f"{schedule.name} with {', '.join(map(str, numbers))} in flight"


def numbers_in_flight(num_workers: int, num_microbatches: int) -> list[int]:
    """Of the first of several workers, those worth a simulation: from the textbook's, one for each later worker beside
    its own, to four for each, which are enough where a message takes as long as a stage works on a micro-batch."""
    later, thirds = num_workers - 1, range(3, 13)
    numbers = {min(1 + math.ceil(third * later / 3), num_microbatches) for third in thirds}
    return sorted({max(number, num_workers) for number in numbers})


def _lack_bytes(simulation: Simulation, memory_bytes: Sequence[int]) -> tuple[int, int]:
    """What the worker lacks that lacks most, not above 0 if nobody lacks anything, and that worker."""
    lacks = (
        (peak - has, worker) for worker, (peak, has) in enumerate(zip(simulation.peak_bytes, memory_bytes, strict=True))
    )
    return max(lacks)


def _refusal(schedule: Schedule, simulation: Simulation, memory_bytes: Sequence[int]) -> str | None:
    lack, worker = _lack_bytes(simulation, memory_bytes)
    if lack <= 0:
        return None
    return (
        f"{label(schedule)} holds {simulation.peak_bytes[worker] / 1e6:.1f} MB of activations on worker {worker}, "
        f"which has {memory_bytes[worker] / 1e6:.1f} MB for them and lacks {lack / 1e6:.1f} MB"
    )


def _reason(best: Candidate, considered: Sequence[Candidate]) -> str:
    step_s = best.simulation.step_s
    reason = (
        f"{label(best.schedule)}: a step takes {step_s:.3g} s, and workers are busy {best.simulation.efficiency:.0%} "
        f"of it; the fastest of {len(considered)} schedules, within {TIE:.0%}"
    )
    faster = [candidate for candidate in considered if candidate.refusal and candidate.simulation.step_s < step_s]
    if faster:
        first = min(faster, key=lambda candidate: candidate.simulation.step_s)
        reason += f", that fit; one of {first.simulation.step_s:.3g} s does not: {first.refusal}"
    return reason
