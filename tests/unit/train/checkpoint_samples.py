"""Small checkpoints whose contents follow from their step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.train.checkpoint import Checkpointer, CheckpointMeta

FACTS = {"data": "d" * 64, "model": "e" * 64, "batches": '{"seed": 1}'}


def meta(step: int, **changes: object) -> CheckpointMeta:
    standard = CheckpointMeta(step, 10 * step, 0, "run", "wandb", FACTS, {})
    return replace(standard, **changes)  # type: ignore[arg-type]


def arrays(value: int, size: int = 1000) -> tuple[Arrays, Arrays]:
    """Parameters and optimizer state full of a value."""
    step = mx.array(value, mx.uint64)
    return {"w": mx.full((size,), float(value))}, {"step": step, "w.m": mx.full((size,), -float(value))}


def no_notice(message: str) -> None:
    raise AssertionError(message)


def checkpointer(folder: Path, save_total_limit: int | None = None, keep_best: bool = False) -> Checkpointer:
    return Checkpointer(folder, save_total_limit, keep_best, no_notice)


def save(folder: Path, step: int, **changes: object) -> Path:
    return checkpointer(folder).save(*arrays(step), meta(step, **changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
