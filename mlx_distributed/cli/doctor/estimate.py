"""What a run would take of every worker, and for how long: what `mlx-distributed plan` computes, in short."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from mlx_distributed.cli.bench.table import format_time
from mlx_distributed.cli.doctor.case import Case
from mlx_distributed.cli.doctor.finding import Finding, counted
from mlx_distributed.cli.parts import load_whole
from mlx_distributed.cli.plan.estimate import Planner
from mlx_distributed.cli.plan.inputs import make_load, read_workers
from mlx_distributed.cli.plan.refusal import check_fit
from mlx_distributed.cli.plan.table import format_bytes
from mlx_distributed.cli.plan.work import Model
from mlx_distributed.errors import ConfigError

LINK = "1Gbit"
"""Between neighbours, as `plan` assumes."""


@dataclass(frozen=True)
class Estimate:
    """Of a run on workers like this machine."""

    worker_bytes: tuple[int, ...]
    """Of each worker of one copy of the model."""
    memory_bytes: int
    """That a worker has."""
    step_s: float
    num_steps: int
    steps_per_epoch: int | None
    """None where nobody knows how many rows there are."""
    refusal: str
    """Why it does not fit; empty where it does."""


def estimate(case: Case) -> Estimate | str:
    """Or why there is none; the model is changed."""
    if case.model is None or case.plan is None or case.tokenizer is None or case.tokenized is None:
        return ""
    config, plan, tokenizer, rows = case.config, case.plan, case.tokenizer, case.tokenized
    try:
        model = Model(case.model)
        workers = read_workers(config, model.outline.dtypes[0], None, None, None, LINK)
        planner = Planner(model, workers, make_load(config, rows))
        found = planner.plan(config.parallel.pipeline)
    except ConfigError as error:
        return str(error)
    refusal = ""
    try:
        check_fit(planner, found, config, lambda other: (Model(load_whole(other, tokenizer)), make_load(other, rows)))
    except ConfigError as error:
        refusal = str(error)
    return Estimate(
        worker_bytes=tuple(worker.total_bytes for worker in found.workers),
        memory_bytes=min(workers.memory_bytes),
        step_s=found.simulation.step_s,
        num_steps=plan.num_steps,
        steps_per_epoch=None if case.corpus is None or case.corpus.report.streaming else plan.steps_per_epoch,
        refusal=refusal,
    )


def check_estimate(found: Estimate | str, num_stages: int) -> Iterator[Finding]:
    """Memory, and time; a model that is to be cut into stages and cannot be is refused."""
    if isinstance(found, str):
        if found:
            yield Finding("memory", "problem" if num_stages > 1 else "warning", f"not estimated: {found}")
        return
    taken, has = format_bytes(max(found.worker_bytes)), format_bytes(found.memory_bytes)
    if found.refusal:
        yield Finding("memory", "problem", found.refusal)
    else:
        yield Finding("memory", "ok", f"about {taken} for a worker, and 0.5 GB for Python; it has {has}")
    parts = [f"a step takes {format_time(found.step_s)} or more"]
    for name, num_steps in (("an epoch", found.steps_per_epoch), ("the run", found.num_steps)):
        if num_steps is not None:
            parts.append(f"{name} of {counted(num_steps, 'step')} {_duration(found.step_s * num_steps)}")
    yield Finding("time", "ok", f"{', '.join(parts)}, counting products of matrices alone")


def _duration(seconds: float) -> str:
    return format_time(seconds) if seconds < 60 else str(timedelta(seconds=round(seconds)))
