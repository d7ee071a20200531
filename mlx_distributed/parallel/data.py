"""Who takes which micro-batches of a step. The result of the step does not depend on it, only its speed does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal


def share(num_microbatches: int, weights: Sequence[float]) -> list[tuple[int, int]]:
    """Cut the micro-batches 0..num_microbatches-1 into one contiguous range per rank, in proportion to the weights.

    A range may be empty. Cumulated shares are rounded to the nearest integer, so that no rank is off by more than one.
    """
    total, cumulated, edges = sum(weights), 0.0, [0]
    for weight in weights:
        cumulated += weight
        edges.append(int(num_microbatches * cumulated / total + 0.5))
    return list(itertools.pairwise(edges))


def rank_weights(setting: Literal["even", "speed", "auto"] | Sequence[float], size: int) -> Sequence[float]:
    """`parallel.share` or `parallel.bandwidth` as one number per rank, alike where none are given."""
    return [1.0] * size if isinstance(setting, str) else setting
