"""A plan as lines of text, of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlx_distributed.cli.bench.table import format_time
from mlx_distributed.cli.plan.estimate import GRADIENT_BYTES, UNLIMITED, Plan, Planner, WorkerPlan
from mlx_distributed.cli.plan.inputs import by_stage
from mlx_distributed.config import Config
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.parallel.choose import TIE

WIDTH = 100
_MEMORY = "{:>6}  {:>9}  {:>10}  {:>8}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}"
_STEP = "{:>6}  {:>9}  {:>9}  {:>9}  {:>11}  {:>6}  {:>11}"
_SCHEDULE = "{:>11}  {:>9}  {:>9}  {:>6}  {:>9}  {}"


def lines(planner: Planner, plan: Plan, config: Config, notes: Sequence[str]) -> Iterator[str]:
    """Everything that there is to say about a plan that fits."""
    load, cost, workers = planner.load, planner.model.cost, planner.workers
    num_stages = len(workers.speeds)
    num_copies = config.parallel.size // num_stages
    yield (
        f"{planner.model.num_layers} layers, {format_count(cost.num_parameters)} parameters, "
        f"{format_count(cost.num_trainable)} trained ({config.method})"
    )
    microbatches = _count(load.num_microbatches, "micro-batch", "micro-batches")
    yield (
        f"{_count(num_copies, 'copy', 'copies')} of the model, each on {_count(num_stages, 'worker')}: {microbatches} "
        f"a step, at most {planner.shape.num_rows} x {planner.shape.length} tokens,"
    )
    yield (
        f"{planner.mean:.0%} of that on average; {_digits(workers.flops / 1e9)} GFLOP/s at speed 1, links of "
        f"{workers.link_bytes_per_s * 8 / 1e9:g} Gbit/s"
    )
    for note in notes:
        yield from textwrap.wrap(f"note: {note}", WIDTH)
    yield ""
    heading = ("layers", "parameters", "trained", "weights", "optimizer", "gradients", "in flight", "computing")
    yield _MEMORY.format("worker", *heading)
    for index, worker in enumerate(plan.workers):
        yield _MEMORY.format(index, format_layers(worker), *_memory(worker))
    yield ""
    yield _STEP.format("worker", "total", "of", "in flight", "micro-batch", "idle", "sent a step")
    for index, worker in enumerate(plan.workers):
        total, of, sent = map(format_bytes, (worker.total_bytes, worker.memory_bytes, worker.sent_bytes))
        compute, idle = format_time(worker.compute_s), f"{worker.idle:.0%}"
        yield _STEP.format(index, total, of, worker.in_flight, compute, idle, sent)
    yield ""
    yield f"a step takes {format_time(plan.simulation.step_s)}"
    if num_copies > 1:
        num_trainable = max(worker.cost.num_trainable for worker in plan.workers)
        num_bytes = 2 * (num_copies - 1) * GRADIENT_BYTES * num_trainable // num_copies
        yield (
            f"and up to {format_time(num_bytes / workers.link_bytes_per_s)} for the gradients, of which a worker sends "
            f"{format_bytes(num_bytes)} to the other copies"
        )
    trained = _for_training(planner, config).plan(plan.settings).split
    if trained != plan.split:
        text = (
            f"training would cut [{_listed(trained)}] where it finds workers of the same speed and enough memory; for "
            f"this plan set parallel.pipeline.split=[{_listed(plan.split)}]"
        )
        yield from textwrap.wrap(text, WIDTH)
    yield from _schedules(planner, plan, config)


def _for_training(planner: Planner, config: Config) -> Planner:
    """Of a run on one machine, which takes workers for alike unless it is told their speeds."""
    speeds, num_stages = config.parallel.pipeline.speeds, len(planner.workers.speeds)
    told = (1.0,) * num_stages if isinstance(speeds, str) else by_stage(speeds, num_stages)
    workers = replace(planner.workers, speeds=told, memory_bytes=(UNLIMITED,) * num_stages)
    return Planner(planner.model, workers, planner.load)


def _schedules(planner: Planner, plan: Plan, config: Config) -> Iterator[str]:
    """How the schedule compares, and what to set for the best one."""
    settings = config.parallel.pipeline
    comparison = planner.compare(settings, plan)
    if comparison is None:
        return
    best = comparison.best
    yield ""
    yield _SCHEDULE.format("schedule", "in flight", "step", "idle", "memory", "").rstrip()
    for other in comparison.plans:
        schedule = other.schedule
        remarks = [f"{schedule.num_chunks} chunks a worker"] if schedule.num_chunks > 1 else []
        remarks += ["configured"] if schedule == plan.schedule and settings.schedule != "auto" else []
        remarks += ["best"] if other is best else []
        remarks += [] if other.fits else ["does not fit"]
        yield _SCHEDULE.format(
            other.settings.schedule,
            schedule.in_flight[0],
            format_time(other.simulation.step_s),
            f"{1 - other.simulation.efficiency:.0%}",
            format_bytes(max(worker.total_bytes for worker in other.workers)),
            ", ".join(remarks),
        ).rstrip()
    yield ""
    yield from textwrap.wrap(comparison.reason + format_in_flight(planner, best, settings), WIDTH)
    if best.schedule != plan.schedule:
        changes = [f"schedule={best.settings.schedule}"]
        if best.schedule.num_chunks > 1:
            changes.append(f"chunks={best.schedule.num_chunks}")
        if best.settings.in_flight != settings.in_flight:
            changes.append(f"in_flight={best.settings.in_flight}")
        if best.split != _for_training(planner, config).plan(replace(best.settings, split="auto")).split:
            changes.append(f"split=[{_listed(best.split)}]")
        yield from textwrap.wrap(
            "to have it, set " + " ".join(f"parallel.pipeline.{change}" for change in changes), WIDTH
        )


def format_in_flight(planner: Planner, plan: Plan, settings: PipelineConfig) -> str:
    """How many micro-batches are in flight, and why; nothing where there was nothing to choose."""
    if settings.in_flight != "auto" or plan.settings.schedule not in ("1f1b", "zb-h1"):
        return ""
    why = f"no other number that fits is faster by more than {TIE:.0%}"
    if plan.settings.in_flight != "auto":
        usual = planner.plan(replace(plan.settings, in_flight="auto", split=plan.split))
        longer = usual.simulation.step_s / plan.simulation.step_s - 1
        why = f"{usual.schedule.in_flight[0]} {f'would take {longer:.0%} longer' if usual.fits else 'do not fit'}"
    return f"; {plan.schedule.in_flight[0]} micro-batches in flight on the first worker: {why}"


def format_bytes(num_bytes: int) -> str:
    """With three digits or so."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return (
                f"{num_bytes / factor:.3g} {unit}" if num_bytes < 999.5 * factor else f"{num_bytes / factor:.0f} {unit}"
            )
    return f"{num_bytes} B"


def format_count(number: int) -> str:
    """With three digits or so."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= factor:
            return f"{_digits(number / factor)} {unit}"
    return str(number)


def format_layers(worker: WorkerPlan) -> str:
    """As in 0-13, or 0-6,14-20 where a worker has several stages."""
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in worker.layers)


def _memory(worker: WorkerPlan) -> tuple[str, ...]:
    cost = worker.cost
    parts = (cost.num_bytes, worker.optimizer_bytes, worker.gradients_bytes, worker.held_bytes, worker.working_bytes)
    return format_count(cost.num_parameters), format_count(cost.num_trainable), *map(format_bytes, parts)


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def _listed(split: Sequence[int]) -> str:
    return ",".join(map(str, split))


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
