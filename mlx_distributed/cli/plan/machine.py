"""This machine, as far as a plan must know it: its memory, and how fast it multiplies."""

from __future__ import annotations

import os
import time

import mlx.core as mx

from mlx_distributed.config.quantities import parse_bytes

TOLERANCE = 0.1
"""By so much the memory that is taken may differ from what was expected."""

_SIZE = 1024
_ROUNDS, _LONG_S = 3, 0.3
"""After so long one round is enough."""


def memory_bytes() -> int:
    """That training may take: what the system recommends for the GPU, which shares it on a Mac, or else all of it."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def planned_bytes(memory_budget: str) -> int:
    """What is planned with of `train.memory_budget`, which is to be kept where more is taken than was expected too."""
    return int((parse_bytes(memory_budget) or 0) / (1 + TOLERANCE))


def measure_flops(dtype: mx.Dtype) -> float:
    """Operations per second in a product of two matrices; the best of a few rounds, as other programs disturb some."""
    left, right = (mx.random.normal((_SIZE, _SIZE)).astype(dtype) for _ in range(2))
    mx.eval(left @ right)
    best_s, first_s = float("inf"), time.perf_counter()
    for _ in range(_ROUNDS):
        begin_s = time.perf_counter()
        mx.eval(left @ right)
        best_s = min(best_s, time.perf_counter() - begin_s)
        if time.perf_counter() - first_s > _LONG_S:
            break
    return 2 * _SIZE**3 / best_s
