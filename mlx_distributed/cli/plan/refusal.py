"""The refusal of a run that does not fit: who lacks how much, and what would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mlx_distributed.cli.plan.estimate import Plan, Planner
from mlx_distributed.cli.plan.table import format_bytes, format_layers
from mlx_distributed.config import Config
from mlx_distributed.errors import ConfigError

MAX_STAGES = 16
"""That are tried as a way out."""


def check_fit(planner: Planner, plan: Plan, config: Config) -> None:
    """Raises ConfigError where a worker has not the memory for its part."""
    if plan.fits:
        return
    lacking = "; ".join(
        f"worker {index} lacks {format_bytes(worker.lack_bytes)} ({worker.lack_bytes} bytes): it has "
        f"{format_bytes(worker.memory_bytes)}, and layers {format_layers(worker)} take "
        f"{format_bytes(worker.cost.num_bytes)} for weights, {format_bytes(worker.optimizer_bytes)} for the optimizer, "
        f"{format_bytes(worker.gradients_bytes)} for gradients, {format_bytes(worker.held_bytes)} for what "
        f"is in flight and {format_bytes(worker.working_bytes)} to compute one"
        for index, worker in enumerate(plan.workers)
        if worker.lack_bytes > 0
    )
    ways = [*_ways(planner, config)]
    most_bytes = max(worker.total_bytes for worker in plan.workers)
    ways.append(f"{format_bytes(most_bytes)} for each worker")
    raise ConfigError(f"the run does not fit: {lacking}; what would fit: {', or '.join(ways)}")


def _ways(planner: Planner, config: Config) -> Iterator[str]:
    """Changes to the configuration that would fit, each by itself."""
    settings, load, workers = config.parallel.pipeline, planner.load, planner.workers
    if settings.split != "auto" and planner.plan(replace(settings, split="auto")).fits:
        split = planner.plan(replace(settings, split="auto")).split
        yield f"parallel.pipeline.split=[{','.join(map(str, split))}]"
    if settings.activations == "keep":
        changed = replace(load, shape=replace(load.shape, keep=False))
        if Planner(planner.model, workers, changed).plan(settings).fits:
            yield "parallel.pipeline.activations=recompute"
    num_rows = load.shape.num_rows
    while num_rows > 1:
        num_rows //= 2
        changed = replace(load, shape=replace(load.shape, num_rows=num_rows))
        if Planner(planner.model, workers, changed).plan(settings).fits:
            yield f"train.micro_batch_size={num_rows}"
            break
    if settings.split != "auto":
        return
    for num_stages in range(len(workers.speeds) + 1, min(planner.model.num_layers // settings.chunks, MAX_STAGES) + 1):
        more = replace(
            workers,
            speeds=(min(workers.speeds),) * num_stages,
            memory_bytes=(min(workers.memory_bytes),) * num_stages,
        )
        if Planner(planner.model, more, load).plan(settings).fits:
            yield f"{num_stages} workers with {format_bytes(min(workers.memory_bytes))} each and as many stages"
            break
