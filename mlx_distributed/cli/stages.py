"""The pipeline of a run: the model cut into stages, and this worker's place among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BucketLayout
from mlx_distributed.comm.group import join_part
from mlx_distributed.config import Config
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.tokenize import Row
from mlx_distributed.errors import CommError
from mlx_distributed.models import trainable
from mlx_distributed.models.costs import Cost, costs
from mlx_distributed.models.outline import Outline, describe
from mlx_distributed.models.stages import cut
from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zero_bubble
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.parallel.partition import LayerCosts, Worker, partition, partition_by
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.validate import lower
from mlx_distributed.train.outer import twin
from mlx_distributed.train.pipeline import Between, Pipeline
from mlx_distributed.train.setup import gradient_layout
from mlx_distributed.train.staged import Chunks, StagePhases

_UNLIMITED = 1 << 62
_ALIKE, _ALONG = 1, 2
"""Generations of the groups of the two axes, by which their errors are told apart."""


@dataclass(frozen=True)
class Staged:
    """What this worker has of a model that is cut into stages."""

    model: nn.Module
    pipeline: Pipeline
    layout: tuple[BucketLayout, ...]
    """Of the gradients of the whole model."""
    worker_of: Mapping[str, int]
    """By name of what is trained, the worker of the pipeline that counts it."""
    tied: str | None
    """What is trained on the first and the last worker."""

    def phases(
        self, config: Config, plan: Plan, rows: Sequence[Row], stop_requested: Callable[[], bool]
    ) -> StagePhases:
        """Of the steps of a run."""
        settings, size = config.parallel.pipeline, self.pipeline.comm.size
        return StagePhases(
            config,
            plan,
            rows,
            stop_requested,
            self.pipeline,
            lambda num_microbatches: make_schedule(settings, size, num_microbatches),
            self.layout,
            self.worker_of,
            self.tied,
        )


def make_mesh(config: Config, comm: Communicator, secret: str) -> Mesh:
    """The axes of a run: neighbouring ranks are the stages of one copy of the model. Raises CommError."""
    num_stages = config.parallel.pipeline.num_stages
    if num_stages == 1:
        return Mesh(dp=comm)
    stage, copy = comm.rank % num_stages, comm.rank // num_stages
    alike, along = range(stage, comm.size, num_stages), range(copy * num_stages, (copy + 1) * num_stages)
    timeout_s = config.parallel.timeout_s
    dp = join_part(comm, alike, f"{secret}/stage-{stage}", timeout_s, _ALIKE)
    return Mesh(dp, join_part(comm, along, f"{secret}/copy-{copy}", timeout_s, _ALONG))


def named(error: CommError, comm: Communicator, mesh: Mesh) -> CommError:
    """An error of one of the axes, with the rank that is lost as it counts among all workers, and its stage."""
    if error.peer is None or error.generation not in (_ALIKE, _ALONG):
        return error
    num_stages = mesh.pp.size
    rank = comm.rank // num_stages * num_stages + error.peer
    if error.generation == _ALIKE:
        rank = error.peer * num_stages + comm.rank % num_stages
    reason = f"stage {rank % num_stages} of the pipeline: {error.reason}"
    return CommError(error.op, rank, 0, error.elapsed_s, reason)


def make_schedule(settings: PipelineConfig, num_workers: int, num_microbatches: int) -> Schedule:
    """What every worker of a pipeline does in a step, with the messages."""
    held = in_flight(settings, num_workers)
    match settings.schedule:
        case "gpipe":
            schedule = gpipe(num_workers, num_microbatches)
        case "interleaved":
            schedule = interleaved(num_workers, num_microbatches, settings.chunks)
        case "zb-h1":
            # ZB-H1 puts off so many gradients of weights; its own numbers are those of `keep`.
            put_off = [limit + worker for worker, limit in enumerate(held)]
            schedule = zero_bubble(num_workers, num_microbatches, held, put_off)
        case "1f1b":
            schedule = one_f_one_b(num_workers, num_microbatches, held)
    return lower(schedule)


def in_flight(settings: PipelineConfig, num_workers: int) -> list[int]:
    """How many micro-batches each worker holds at a time: fewer from the first to the last, which holds one.

    By simulation 2p - 1 on the first of p workers is the best, or as good as that, at every link time up to one and a
    half forward passes.
    """
    first = settings.in_flight
    if isinstance(first, str):
        first = num_workers if settings.activations == "keep" else 2 * num_workers - 1
    rest = max(num_workers - 1, 1)
    return [1 + math.ceil((first - 1) * (num_workers - 1 - worker) / rest) for worker in range(num_workers)]


def cut_into_stages(model: nn.Module, config: Config, comm: Communicator) -> Staged:
    """Leave of a model, which was loaded and prepared lazily, what this worker computes.

    Args:
        model: is changed.
        config: of the run.
        comm: of the workers of the pipeline.

    Raises:
        ConfigError: the model cannot be cut in this way.
    """
    settings, outline = config.parallel.pipeline, describe(model)
    parameters = trainable(model)
    split = split_of(model, settings, comm.size)
    edges = [0, *accumulate(split)]
    stages = [
        cut(twin(model) if chunk else model, *pair)
        for chunk, pair in reversed(list(enumerate(list(pairwise(edges))[comm.rank :: comm.size])))
    ][::-1]
    worker_of = {name: _stage_of(name, outline, edges) % comm.size for name in parameters}
    tied = [name for name in parameters if outline.tied and name.startswith(_prefixes(outline.embedding))]
    pipeline = Pipeline(
        stages,
        [Between(outline.width, outline.dtypes[start]) for start in edges[:-1]],
        comm,
        keep=settings.activations == "keep",
        wire_dtype=mx.bfloat16 if settings.wire_dtype == "bf16" else None,
    )
    held = stages[0] if len(stages) == 1 else Chunks(stages)
    return Staged(held, pipeline, gradient_layout(parameters), worker_of, tied[0] if tied else None)


def split_of(model: nn.Module, settings: PipelineConfig, num_workers: int) -> tuple[int, ...]:
    """Layers of each stage. Raises ConfigError where what was given does not fit."""
    total = costs(model)
    layers = [_layer(cost) for cost in total.layers]
    head = total.head + total.embedding if total.tied else total.head
    ends = _layer(Cost(0, total.embedding.num_trainable, total.embedding.num_bytes)), _layer(head)
    workers = [Worker(1.0, _UNLIMITED, 1)] * (num_workers * settings.chunks)
    if settings.split == "auto":
        return partition(layers, *ends, workers).split
    return partition_by(settings.split, layers, *ends, workers).split


def _layer(cost: Cost) -> LayerCosts:
    """Work is in proportion to the values that every token is multiplied with; an embedding is only looked up."""
    return LayerCosts(float(cost.num_parameters), cost.num_bytes + 12 * cost.num_trainable)


def _stage_of(name: str, outline: Outline, edges: Sequence[int]) -> int:
    if name.startswith(f"{outline.layers}."):
        layer = int(name.removeprefix(f"{outline.layers}.").partition(".")[0])
        return next(stage for stage, stop in enumerate(edges[1:]) if layer < stop)
    return 0 if name.startswith(_prefixes(outline.embedding)) else len(edges) - 2


def _prefixes(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)
