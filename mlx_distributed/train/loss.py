"""Summed, masked cross-entropy, and the norm of a gradient.

Shapes: B rows, L tokens, V vocabulary. Losses and gradients are sums over label tokens, never means: the one division
by the number of label tokens of the whole step comes after the reduction.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

SUM_BLOCK = 256
"""Elements that are summed at once."""


def summed_loss(model: nn.Module, tokens: mx.array, loss_mask: mx.array) -> mx.array:
    """Cross-entropy in nats, summed over the tokens that are targets.

    Args:
        model: token ids [B, L] -> logits [B, L, V].
        tokens: int32 [B, L].
        loss_mask: bool [B, L], true where the token is a target; the first token of a row never is one.

    Returns:
        float32 scalar.
    """
    logits = model(tokens[:, :-1]).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
    return mx.where(loss_mask[:, 1:], losses, 0.0).sum()


def global_norm(arrays: Iterable[mx.array]) -> mx.array:
    """The 2-norm of all arrays together, a float32 scalar.

    Squares are summed over fixed blocks of each array, and the sums of the blocks in the order given, so that the bits
    do not depend on which rank holds what.
    """
    return mx.sqrt(_sum(mx.stack([_sum(mx.square(array).reshape(-1)) for array in arrays])))


def _sum(values: mx.array) -> mx.array:
    """Sum of a flat array, block by block: MLX adds on a CPU from one end to the other, which costs a million elements
    three of their seven digits."""
    while values.size > 1:
        whole = values.size // SUM_BLOCK * SUM_BLOCK
        blocks, rest = values[:whole].reshape(-1, SUM_BLOCK).sum(axis=1), values[whole:]
        values = mx.concatenate([blocks, rest.sum(keepdims=True)]) if rest.size else blocks
    return values.sum()
