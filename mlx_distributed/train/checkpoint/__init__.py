"""Checkpoints: saved so that a kill at any moment leaves the older ones, and checked before they are used.

A checkpoint is a folder `step-<8 digits>` with `params.safetensors`, `optimizer.safetensors` and `manifest.json`, which
has their sizes and hashes. It is written under a hidden name and renamed: `.step-<8 digits>.tmp` is being written or
removed, `.step-<8 digits>.old` is the former checkpoint of a step that is being saved again.
"""

from __future__ import annotations

from mlx_distributed.train.checkpoint.manifest import CheckpointMeta
from mlx_distributed.train.checkpoint.read import Checkpoint, best, locate, newest_valid, open_checkpoint
from mlx_distributed.train.checkpoint.write import Checkpointer

__all__ = [
    "Checkpoint",
    "CheckpointMeta",
    "Checkpointer",
    "best",
    "locate",
    "newest_valid",
    "open_checkpoint",
]
