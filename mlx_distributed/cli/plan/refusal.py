"""The refusal of a run that does not fit: who lacks how much, and what would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from mlx_distributed.cli.plan.estimate import Load, Plan, Planner, Workers
from mlx_distributed.cli.plan.table import format_bytes, format_layers
from mlx_distributed.cli.plan.work import Model
from mlx_distributed.config import Config
from mlx_distributed.config.checks import check
from mlx_distributed.errors import ConfigError

MAX_STAGES = 16
"""That are tried as a way out."""

Remake = Callable[[Config], tuple[Model, Load]]


def check_fit(planner: Planner, plan: Plan, config: Config, remake: Remake) -> None:
    """Refuse a run that does not fit.

    Args:
        planner, plan: of the run.
        config: of the run.
        remake: the model and what is computed in a step, of another configuration.

    Raises:
        ConfigError: a worker has not the memory for its part; says what would do.
    """
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
    ways = [*_ways(planner, config, remake)]
    most_bytes = max(worker.total_bytes for worker in plan.workers)
    ways.append(f"{format_bytes(most_bytes)} for each worker")
    raise ConfigError(f"the run does not fit: {lacking}; what would fit: {', or '.join(ways)}")


def _ways(planner: Planner, config: Config, remake: Remake) -> Iterator[str]:
    """Changes to the configuration that would fit, each by itself."""
    settings, workers = config.parallel.pipeline, planner.workers
    if settings.split != "auto" and planner.plan(replace(settings, split="auto")).fits:
        split = planner.plan(replace(settings, split="auto")).split
        yield f"parallel.pipeline.split=[{','.join(map(str, split))}]"
    for alternatives in _alternatives(config):
        for text, changed in alternatives:
            if not check(changed) and Planner(*_of(remake(changed), workers)).plan(changed.parallel.pipeline).fits:
                yield text
                break
    if settings.split != "auto":
        return
    for num_stages in range(len(workers.speeds) + 1, min(planner.model.num_layers // settings.chunks, MAX_STAGES) + 1):
        more = replace(
            workers,
            speeds=(min(workers.speeds),) * num_stages,
            memory_bytes=(min(workers.memory_bytes),) * num_stages,
        )
        if Planner(planner.model, more, _staged(planner.load)).plan(settings).fits:
            yield f"{num_stages} workers with {format_bytes(min(workers.memory_bytes))} each and as many stages"
            break


def _alternatives(config: Config) -> Iterator[list[tuple[str, Config]]]:
    """What takes less memory, as it is written and what comes of it; of each kind, that which changes least first."""
    train, parallel, pipeline = config.train, config.parallel, config.parallel.pipeline
    if pipeline.num_stages > 1:
        settings = replace(parallel, pipeline=replace(pipeline, activations="recompute"))
        yield [("parallel.pipeline.activations=recompute", replace(config, parallel=settings))]
    else:  # Of a model that is cut, what is computed in and trained is settled before.
        lower = [] if config.precision != "fp32" else [("precision=bf16", replace(config, precision="bf16"))]
        yield lower
    yield [("train.gradient_checkpointing=true", _with(config, gradient_checkpointing=True))]
    if train.micro_batch_tokens is not None:
        sizes, key = halves(train.micro_batch_tokens), "micro_batch_tokens"
    else:
        sizes = [size for size in halves(train.micro_batch_size) if not train.global_batch_size % size]
        key = "micro_batch_size"
    yield [(f"train.{key}={size}", _with(config, **{key: size})) for size in sizes]
    if pipeline.num_stages == 1:
        shard = replace(config, optimizer=replace(config.optimizer, shard=True))
        if parallel.size > 1:
            yield [("optimizer.shard=true", shard)]
        elif not config.elastic.enabled:
            yield [
                (f"optimizer.shard=true with --nproc {num}", replace(shard, parallel=replace(parallel, nproc=num)))
                for num in range(2, MAX_STAGES + 1)
            ]
        if config.method == "full":
            yield [("method=lora", replace(config, method="lora"))]


def halves(size: int) -> list[int]:
    """Half of it, a quarter of it, and so on down to 1."""
    return [size >> times for times in range(1, size.bit_length())]


def _with(config: Config, **train: int | bool) -> Config:
    return replace(config, train=replace(config.train, **train))  # type: ignore[arg-type]  # mypy knows no names here


def _of(remade: tuple[Model, Load], workers: Workers) -> tuple[Model, Workers, Load]:
    model, load = remade
    return model, workers, load


def _staged(load: Load) -> Load:
    """Of a model that is cut into stages, in place of one in one piece."""
    return replace(load, shapes=tuple(replace(shape, order="stage") for shape in load.shapes), whole=None)
