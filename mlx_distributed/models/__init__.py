"""Language models: load or build one, make it trainable, write it where mlx-lm can load it."""

from __future__ import annotations

from mlx_distributed.models.gradient_checkpointing import checkpoint_layers
from mlx_distributed.models.load import load
from mlx_distributed.models.prepare import Method, fingerprint, layers, prepare, trainable
from mlx_distributed.models.save import save_final
from mlx_distributed.models.scratch import build_scratch
from mlx_distributed.models.tokenizer import train_tokenizer, wrap_tokenizer

__all__ = [
    "Method",
    "build_scratch",
    "checkpoint_layers",
    "fingerprint",
    "layers",
    "load",
    "prepare",
    "save_final",
    "train_tokenizer",
    "trainable",
    "wrap_tokenizer",
]
