"""`split: auto` and `schedule: auto` of a run that begins: rank 0 plans with what all workers say of themselves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.cli.bench.table import format_time
from mlx_distributed.cli.plan.estimate import Plan, Planner, Workers
from mlx_distributed.cli.plan.inputs import by_stage, make_load
from mlx_distributed.cli.plan.machine import measure_flops, memory_bytes, planned_bytes
from mlx_distributed.cli.plan.refusal import check_fit
from mlx_distributed.cli.plan.table import format_in_flight, format_layers
from mlx_distributed.cli.plan.work import Model
from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.link_speed import levelled
from mlx_distributed.config import Config
from mlx_distributed.config.schema import PipelineConfig
from mlx_distributed.data.tokenize import TokenizedCorpus
from mlx_distributed.errors import CommError, ConfigError
from mlx_distributed.models.outline import describe
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.outer import twin

_WHAT = "the plan of the pipeline"
_DECIDED = "split", "schedule", "chunks", "in_flight"
_LOOPBACK = 1.25e9
"""Bytes per second."""
_UNKNOWN = 1.0
"""Of what does not matter for what is to be decided."""


class Worker(NamedTuple):
    """What one says of itself."""

    memory_bytes: int
    """Its share of that of its machine."""
    flops: float
    """Per second."""


class Settled(NamedTuple):
    """What was decided."""

    settings: PipelineConfig
    """With the layers of each stage and a schedule."""
    reason: str
    """For people, in a line."""


def settle(
    model: nn.Module, config: Config, rows: TokenizedCorpus | None, comm: Communicator, machines: Sequence[str] = ()
) -> Settled:
    """Decide how a model is cut and by which schedule it is computed; called on all ranks.

    Only rank 0 plans: what a graph takes may differ a little from one machine to another, and the cut must not.

    Args:
        model: prepared for training, lazily.
        config: of the run.
        rows: that are trained on; None takes micro-batches for as long as they may be.
        comm: of all ranks; of one alone in a dry run, which takes all workers for alike.
        machines: by rank; none where all are on one.

    Raises:
        ConfigError: the model cannot be cut in this way, or a worker has not the memory for its part.
        CommError: a rank is lost.
    """
    settings, num_machines = config.parallel.pipeline, len(set(machines))
    dtype = describe(model).dtypes[0]
    num_here = list(machines).count(machines[comm.rank]) if machines else config.parallel.nproc
    chooses = settings.schedule == "auto"
    measures = chooses or (num_machines > 1 and settings.speeds == settings.split == "auto")
    budget = config.train.memory_budget
    of_mine = memory_bytes() // num_here if budget is None else planned_bytes(budget)
    own = Worker(of_mine, measure_flops(dtype) if measures else _UNKNOWN)
    gathered = comm.all_gather(mx.array(np.frombuffer(json.dumps(own).encode(), np.uint8)), _WHAT)
    found = [Worker(*json.loads(np.asarray(array).tobytes())) for array in gathered]
    found *= config.parallel.size // len(found)
    link_bytes_per_s = _slowest_link(comm) if chooses else _UNKNOWN
    told = b""
    if comm.rank == 0:
        workers = workers_of(config, found, num_machines, link_bytes_per_s)
        told = json.dumps(_told(model, config, rows, workers)).encode()
    decided = json.loads(broadcast_bytes(told, comm, _WHAT))
    if "error" in decided:
        with contextlib.suppress(CommError):
            comm.barrier(_WHAT)  # Who leaves now would take it from those that have not read it yet.
        raise ConfigError(decided["error"])
    changes = {**decided["settings"], "split": tuple(decided["settings"]["split"])}
    return Settled(replace(settings, **changes), decided["reason"])


def _slowest_link(comm: Communicator) -> float:
    """Bytes per second, each way; of a dry run, which has none, about what there is within a machine."""
    if not isinstance(comm, GrpcComm):
        return _LOOPBACK
    return min(link.bytes_per_s for link in comm.measure_links(range(comm.size))) or _LOOPBACK


def workers_of(config: Config, found: Sequence[Worker], num_machines: int, link_bytes_per_s: float) -> Workers:
    """Of one copy of the model. On one machine, and where they differ by no more than noise, workers are alike."""
    pipeline = config.parallel.pipeline
    measured = [worker.flops for worker in found]
    speeds = [1.0] * len(found)
    if not isinstance(pipeline.speeds, str):
        speeds = list(pipeline.speeds)
    elif num_machines > 1:
        levels = levelled(measured)
        speeds = [level / max(levels) for level in levels]
    return Workers(
        by_stage(speeds, pipeline.num_stages),
        by_stage([worker.memory_bytes for worker in found], pipeline.num_stages),
        sum(measured) / sum(speeds),
        link_bytes_per_s,
    )


def decide(model: nn.Module, config: Config, rows: TokenizedCorpus | None, workers: Workers) -> Settled:
    """What rank 0 decides: a function of its arguments alone.

    Args:
        model, config, rows: as in `settle`.
        workers: of one copy of the model.

    Raises:
        ConfigError: as in `settle`.
    """
    settings = config.parallel.pipeline
    planner = Planner(Model(twin(model)), workers, make_load(config, rows))
    plan = planner.plan(settings)
    check_fit(planner, plan, config, lambda changed: (planner.model, make_load(changed, rows)))
    return Settled(replace(plan.settings, split=plan.split), _reason(planner, plan, settings))


def _told(model: nn.Module, config: Config, rows: TokenizedCorpus | None, workers: Workers) -> dict[str, Any]:
    """What rank 0 tells all."""
    try:
        settings, reason = decide(model, config, rows, workers)
    except ConfigError as error:
        return {"error": str(error)}
    return {"settings": {name: getattr(settings, name) for name in _DECIDED}, "reason": reason}


def _reason(planner: Planner, plan: Plan, settings: PipelineConfig) -> str:
    speeds = planner.workers.speeds
    layers = " | ".join(format_layers(worker) for worker in plan.workers)
    alike = len(set(speeds)) == 1
    of = "workers that are alike" if alike else f"speeds {' : '.join(f'{speed / min(speeds):.3g}' for speed in speeds)}"
    how = f"for {of}" if settings.split == "auto" else "as given"
    line = f"pipeline: layers {layers}, {how}; {plan.settings.schedule}"
    if settings.schedule != "auto":
        return line
    comparison = planner.compare(settings, plan)
    assert comparison is not None
    others = ", ".join(
        f"{other.settings.schedule} {format_time(other.simulation.step_s) if other.fits else 'does not fit'}"
        for other in comparison.plans
        if other.schedule != plan.schedule
    )
    rates = f"{planner.workers.flops / 1e9:.3g} GFLOP/s and {8 * planner.workers.link_bytes_per_s / 1e9:.3g} Gbit/s"
    step = format_time(plan.simulation.step_s) + " a step" + format_in_flight(planner, plan, settings)
    return f"{line}, the fastest at {rates}: {step} ({others})"
