"""Which evaluation is the best, and whether it pays to go on: pure functions of what all ranks know was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator

EVAL_LOSS, EVAL_PERPLEXITY = "eval/loss", "eval/perplexity"

Evaluations = Mapping[int, float]
"""By step, the metric that decides, as it was measured; it may be infinite."""


def cost(metric: str, value: float | None) -> float:
    """Lower is better: the value itself of loss and perplexity, its negative of any other metric; infinite where there
    is none, or it is not a number."""
    if value is None or math.isnan(value):
        return math.inf
    return value if metric in (EVAL_LOSS, EVAL_PERPLEXITY) else -value


def stops_early(metric: str, evaluations: Evaluations, patience: int | None, min_delta: float) -> bool:
    """Whether none of the last `patience` evaluations was better than the best before them, by more than `min_delta`.

    Args:
        metric: that was measured.
        evaluations: all so far.
        patience: at least 1; None never stops.
        min_delta: at least 0.
    """
    if patience is None or len(evaluations) <= patience:
        return False
    costs = [cost(metric, evaluations[step]) for step in sorted(evaluations)]
    return min(costs[-patience:]) >= min(costs[:-patience]) - min_delta


def to_lines(metric: str, evaluations: Evaluations) -> tuple[dict[str, float | None], ...]:
    """As a checkpoint has them: lines like those of metrics.jsonl, with null for what is not finite."""
    return tuple({"step": step, metric: value if math.isfinite(value) else None} for step, value in evaluations.items())


def from_lines(metric: str, lines: Sequence[Mapping[str, float | None]]) -> dict[int, float]:
    """What `to_lines` was given; empty where the lines are of another metric."""
    found = {line["step"]: line[metric] for line in lines if metric in line}
    return {int(step or 0): math.nan if value is None else value for step, value in found.items()}


def share_evaluations(evaluations: Evaluations, step: int, comm: Communicator) -> dict[int, float]:
    """What any rank knows of, up to a step: who came to the run later has not seen all. Raises CommError.

    Where nobody is left that has, counting begins anew.
    """
    mine = np.frombuffer(json.dumps(list(evaluations.items())).encode(), np.uint8)
    known: dict[int, float] = {}
    for gathered in reversed(comm.all_gather(mx.array(mine), "the evaluations so far")):
        known |= dict(json.loads(np.asarray(gathered).tobytes()))
    return {at: value for at, value in sorted(known.items()) if at <= step}
