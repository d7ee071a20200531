"""The learning rate of a step: a pure function of the step, so that there is nothing to save and restore."""

from __future__ import annotations

import math

from mlx_distributed.config import SchedulerConfig

DEFAULT_WARMUP_RATIO = 0.03


def num_warmup_steps(scheduler: SchedulerConfig, num_steps: int) -> int:
    """Steps of linear warm-up; never all of them."""
    if scheduler.warmup_steps is not None:
        return min(scheduler.warmup_steps, num_steps - 1)
    ratio = DEFAULT_WARMUP_RATIO if scheduler.warmup_ratio is None else scheduler.warmup_ratio
    return min(math.ceil(ratio * num_steps), num_steps - 1)


def learning_rate(scheduler: SchedulerConfig, peak: float, step: int, num_steps: int) -> float:
    """Of step 0..num_steps-1: linear from peak / (warm-up + 1) to the peak, then down to `min_lr_ratio` of it.

    The step after the last one would have the final rate, so that the last step still does some work.
    """
    warmup = num_warmup_steps(scheduler, num_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[scheduler.name]
    return peak * (scheduler.min_lr_ratio + (1.0 - scheduler.min_lr_ratio) * decay)
