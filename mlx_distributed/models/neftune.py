"""NEFTune: noise on the embeddings of training rows.

The numbers are drawn from a key of their own, made of where the random numbers stand: so they are those of the
micro-batch, whoever computes it, and dropout draws what it draws without noise.

Source:
    Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning". As there in its library form (TRL),
    rows side by side count with their padding; packed rows count by themselves.

Shapes: B rows, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.outline import mixed
from mlx_distributed.models.random_state import random_key
from mlx_distributed.models.stages import Stage

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_NAMES = {"embed_in", "embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte"}
_STREAM = 0x4E4546  # tells the key from that of dropout


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let the token embedding of a model, or of its first stage, add noise in training mode.

    Args:
        model: ready to train; if it takes packed rows, made so before.
        alpha: noise is uniform within alpha / sqrt(L D).

    Raises:
        ConfigError: it is not known which of its parts embeds tokens.
    """
    if isinstance(model, Stage) and not model.span.is_first:
        return
    found: list[nn.Module] = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _EMBEDDINGS) and name.rpartition(".")[2] in _NAMES
    ]
    if len(found) != 1:
        architecture = getattr(model, "model_type", type(model).__name__)
        raise ConfigError(
            f"train.neftune_noise_alpha={alpha:g}: the architecture {architecture} has {len(found)} parts that are "
            f"known to embed tokens ({', '.join(sorted(_NAMES))}), and one is needed; leave it out"
        )
    embedding: Any = found[0]
    embedding.__class__ = mixed(_Noisy, type(found[0]))
    embedding.noise_alpha, embedding.packing = alpha, getattr(model, "packing", None)


class _Noisy:
    """Mixed into the class of an embedding."""

    def __call__(self: Any, tokens: mx.array) -> mx.array:
        hidden: mx.array = super().__call__(tokens)  # type: ignore[misc]
        if not self.training:
            return hidden
        layout = None if self.packing is None else self.packing.layout
        lengths = np.full(1, tokens.shape[-1]) if layout is None else layout.lengths
        bounds = mx.array(self.noise_alpha / np.sqrt(lengths * hidden.shape[-1]), hidden.dtype)[:, None]
        key = mx.random.key((random_key() + _STREAM) % 2**64)
        return hidden + bounds * mx.random.uniform(-1.0, 1.0, hidden.shape, hidden.dtype, key)
