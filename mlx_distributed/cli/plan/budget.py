"""`train.memory_budget`: what a run will take is compared with it before the start, and with the peak at the end."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.cli.plan.estimate import Load, Planner, Workers
from mlx_distributed.cli.plan.inputs import make_load
from mlx_distributed.cli.plan.machine import TOLERANCE, planned_bytes
from mlx_distributed.cli.plan.refusal import check_fit
from mlx_distributed.cli.plan.table import format_bytes
from mlx_distributed.cli.plan.work import Model
from mlx_distributed.config import Config
from mlx_distributed.config.quantities import parse_bytes
from mlx_distributed.data.tokenize import TokenizedCorpus
from mlx_distributed.errors import ConfigError


def expect(config: Config, rows: TokenizedCorpus | None, budget: str, make: Callable[[Config], nn.Module]) -> int:
    """Bytes that MLX will hold at most on a worker that has a whole copy of the model; MLX is told the budget, so that
    it gives back what it keeps for later before it would take more.

    Args:
        config: of the run.
        rows: that are trained on; None takes micro-batches for as long as they may be.
        budget: `train.memory_budget`.
        make: a model, prepared for training, lazily.

    Raises:
        ConfigError: it is more than that.
    """
    workers = Workers(speeds=(1.0,), memory_bytes=(planned_bytes(budget),), flops=1.0, link_bytes_per_s=1.0)

    def remake(changed: Config) -> tuple[Model, Load]:
        return Model(make(changed)), make_load(changed, rows)

    model, load = remake(config)
    planner = Planner(model, workers, load)
    plan = planner.plan(config.parallel.pipeline)
    try:
        check_fit(planner, plan, config, remake)
    except ConfigError as error:
        given = f"train.memory_budget={budget}, of which {1 - 1 / (1 + TOLERANCE):.0%} are held back"
        raise ConfigError(f"{given}, as memory is foretold within {TOLERANCE:.0%}: {error}") from None
    mx.set_memory_limit(parse_bytes(budget) or 0)
    return max(worker.total_bytes for worker in plan.workers)


def verdict(expected_bytes: int, peak_bytes: int) -> str | None:
    """What there is to say about a peak that differs from what was expected; None where it does not by much."""
    if abs(peak_bytes - expected_bytes) <= TOLERANCE * peak_bytes:
        return None
    return (
        f"memory: MLX has held {format_bytes(peak_bytes)} at most, and {format_bytes(expected_bytes)} were expected; "
        "train.memory_budget is compared with the latter"
    )
