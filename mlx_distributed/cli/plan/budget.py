"""`train.memory_budget`: what a run will take is compared with it before the start, and with the peak at the end."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.cli.plan.estimate import Planner, Workers
from mlx_distributed.cli.plan.inputs import make_load
from mlx_distributed.cli.plan.refusal import check_fit
from mlx_distributed.cli.plan.table import format_bytes
from mlx_distributed.cli.plan.work import Model
from mlx_distributed.config import Config
from mlx_distributed.data.tokenize import TokenizedCorpus
from mlx_distributed.train.outer import twin

TOLERANCE = 0.1
"""By so much a peak may differ from what was expected without anybody being told."""


def expect(model: nn.Module, config: Config, rows: TokenizedCorpus | None, budget_bytes: int) -> int:
    """Bytes that MLX will hold at most on a worker that has a whole copy of the model; MLX is told the budget, so that
    it gives back what it keeps for later before it would take more.

    Args:
        model: prepared for training.
        config: of the run.
        rows: that are trained on; None takes micro-batches for as long as they may be.
        budget_bytes: that there are.

    Raises:
        ConfigError: it is more than that.
    """
    workers = Workers(speeds=(1.0,), memory_bytes=(budget_bytes,), flops=1.0, link_bytes_per_s=1.0)
    planner = Planner(Model(twin(model)), workers, make_load(config, rows))
    plan = planner.plan(config.parallel.pipeline)
    check_fit(planner, plan, config)
    mx.set_memory_limit(budget_bytes)
    return max(worker.total_bytes for worker in plan.workers)


def verdict(expected_bytes: int, peak_bytes: int) -> str | None:
    """What there is to say about a peak that differs from what was expected; None where it does not by much."""
    if abs(peak_bytes - expected_bytes) <= TOLERANCE * peak_bytes:
        return None
    return (
        f"memory: MLX has held {format_bytes(peak_bytes)} at most, and {format_bytes(expected_bytes)} were expected; "
        "train.memory_budget is compared with the latter"
    )
