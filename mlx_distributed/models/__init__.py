"""Language models: load or build one, make it trainable, write it where mlx-lm can load it."""

from __future__ import annotations

from mlx_distributed.models.gradient_checkpointing import checkpoint_layers
from mlx_distributed.models.load import load, read_tokenizer
from mlx_distributed.models.neftune import add_noise
from mlx_distributed.models.packed import isolate
from mlx_distributed.models.precision import check_range, compute_in
from mlx_distributed.models.prepare import Method, fingerprint, layers, prepare, trainable
from mlx_distributed.models.save import save_final
from mlx_distributed.models.scratch import build_scratch
from mlx_distributed.models.tokenizer import train_tokenizer, wrap_tokenizer

__all__ = [
    "Method",
    "add_noise",
    "build_scratch",
    "check_range",
    "checkpoint_layers",
    "compute_in",
    "fingerprint",
    "isolate",
    "layers",
    "load",
    "prepare",
    "read_tokenizer",
    "save_final",
    "train_tokenizer",
    "trainable",
    "wrap_tokenizer",
]
