"""The pipeline of a run: the model cut into stages, and this worker's place among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BucketLayout
from mlx_distributed.comm.group import join_part
from mlx_distributed.config import Config
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.data.stream import AnyPlan, AnyRows
from mlx_distributed.errors import CommError
from mlx_distributed.models import trainable
from mlx_distributed.models.outline import Outline, describe
from mlx_distributed.models.stages import cut, make_cache
from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zero_bubble
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.parallel.partition import check_split
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.validate import lower
from mlx_distributed.train.outer import twin
from mlx_distributed.train.pipeline import Between, Pipeline
from mlx_distributed.train.setup import gradient_layout
from mlx_distributed.train.staged import Chunks, StagePhases

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity

_ALIKE, _ALONG = 1, 2
"""Generations of the groups of the two axes, by which their errors are told apart."""
_WIRE_DTYPES = {"fp32": None, "bf16": mx.bfloat16, "int8": mx.int8}


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
    settings: PipelineConfig
    """With the layers of each stage, and a schedule."""
    reason: str
    """For these settings, for people."""

    def phases(self, config: Config, plan: AnyPlan, rows: AnyRows, stop_requested: Callable[[], bool]) -> StagePhases:
        """Of the steps of a run."""
        settings, size = self.settings, self.pipeline.comm.size
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


def make_mesh(
    config: Config,
    comm: Communicator,
    secret: str,
    host: str = "127.0.0.1",
    identity: Identity | None = None,
    machines: Sequence[str] = (),
) -> Mesh:
    """The axes of a run: neighbouring ranks are the stages of one copy of the model.

    Args:
        config: of the run.
        comm: of all ranks.
        secret: of the run.
        host: address of the interface on which this rank listens.
        identity: of the run, for TLS; None for ranks on one machine.
        machines: by rank, in words; none where all are on one.

    Raises:
        CommError: a peer did not come, or was refused.
    """
    num_stages = config.parallel.pipeline.num_stages
    if num_stages == 1:
        return Mesh(dp=comm, machines=tuple(machines))
    stage, copy = comm.rank % num_stages, comm.rank // num_stages
    alike, along = range(stage, comm.size, num_stages), range(copy * num_stages, (copy + 1) * num_stages)
    dp, pp = (
        join_part(comm, ranks, f"{secret}/{name}", config.parallel.timeout_s, generation, f"{host}:0", identity)
        for ranks, name, generation in ((alike, f"stage-{stage}", _ALIKE), (along, f"copy-{copy}", _ALONG))
    )
    return Mesh(dp, pp, tuple(machines))


def named(error: CommError, comm: Communicator, mesh: Mesh) -> CommError:
    """An error of one of the groups, with the rank that is lost as it counts among all workers, its stage and its
    machine."""
    if error.peer is None:
        return error
    rank, num_stages = error.peer, mesh.pp.size
    if error.generation == _ALIKE:
        rank = error.peer * num_stages + comm.rank % num_stages
    elif error.generation == _ALONG:
        rank = comm.rank // num_stages * num_stages + error.peer
    stage = f"stage {rank % num_stages} of the pipeline" if num_stages > 1 else ""
    machine = f"on {mesh.machines[rank]}" if mesh.machines else ""
    where = " ".join(filter(None, (stage, machine)))
    return CommError(error.op, rank, 0, error.elapsed_s, f"{where}: {error.reason}") if where else error


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
        case "1f1b" | "auto":  # Until it is decided.
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


def cut_into_stages(
    model: nn.Module, config: Config, settings: PipelineConfig, comm: Communicator, reason: str = ""
) -> Staged:
    """Leave of a model, which was loaded and prepared lazily, what this worker computes.

    Args:
        model: is changed.
        config: of the run.
        settings: with the layers of each stage, and a schedule.
        comm: of the workers of the pipeline.
        reason: for these settings, for people.

    Raises:
        ConfigError: the model cannot be cut in this way.
    """
    outline, parameters = describe(model), trainable(model)
    assert not isinstance(settings.split, str)
    check_split(settings.split, outline.num_layers, comm.size * settings.chunks)
    edges = [0, *accumulate(settings.split)]
    stages = [
        cut(twin(model) if chunk else model, *pair)
        for chunk, pair in reversed(list(enumerate(list(pairwise(edges))[comm.rank :: comm.size])))
    ][::-1]
    if config.eval.generate:  # Found out now, and not when the first steps are done.
        for stage in stages:
            make_cache(stage)
    worker_of = {name: _stage_of(name, outline, edges) % comm.size for name in parameters}
    tied = [name for name in parameters if outline.tied and name.startswith(_prefixes(outline.embedding))]
    pipeline = Pipeline(
        stages,
        [Between(outline.width, outline.dtypes[start]) for start in edges[:-1]],
        comm,
        keep=settings.activations == "keep",
        wire_dtype=_WIRE_DTYPES[settings.wire_dtype],
    )
    held = stages[0] if len(stages) == 1 else Chunks(stages)
    counted = gradient_layout(parameters), worker_of, tied[0] if tied else None
    return Staged(held, pipeline, *counted, settings, reason)


def _stage_of(name: str, outline: Outline, edges: Sequence[int]) -> int:
    if name.startswith(f"{outline.layers}."):
        layer = int(name.removeprefix(f"{outline.layers}.").partition(".")[0])
        return next(stage for stage, stop in enumerate(edges[1:]) if layer < stop)
    return 0 if name.startswith(_prefixes(outline.embedding)) else len(edges) - 2


def _prefixes(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{module}." for module in modules)
