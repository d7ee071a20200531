"""Summed, masked cross-entropy, and the norm of a gradient.

Shapes: B rows, L tokens, V vocabulary. Losses and gradients are sums over label tokens, never means: the one division
by the number of label tokens of the whole step comes after the reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.comm.buckets import BLOCK, Bucket

SUM_BLOCK = 256
"""Elements that are summed at once."""
ROW = 128
"""Of the squares in a block."""


def summed_loss(model: Callable[[mx.array], mx.array], tokens: mx.array, loss_mask: mx.array) -> mx.array:
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


def block_sums(arrays: Bucket) -> mx.array:
    """Sums of squares over blocks of `BLOCK` elements of the arrays one after the other, float32 [num_blocks].

    A slice of a bucket begins and ends with a block, so its sums have the bits that they have in the whole bucket.
    """
    flat = [array.reshape(-1) for array in arrays]
    if rest := -sum(array.size for array in arrays) % BLOCK:
        flat.append(mx.zeros(rest))
    whole = flat[0] if len(flat) == 1 else mx.concatenate(flat)
    num_blocks = whole.size // BLOCK
    sums = mx.square(whole).reshape(num_blocks * BLOCK // ROW, ROW).sum(axis=1).reshape(num_blocks, BLOCK // ROW)
    while (half := sums.shape[1] // 2) > 0:  # Elementwise: how a kernel adds few rows may depend on their number.
        sums = sums[:, :half] + sums[:, half:]
    return sums.reshape(num_blocks)


def global_norm(sums: Sequence[mx.array]) -> mx.array:
    """The 2-norm of all buckets together, a float32 scalar, from their `block_sums` in order, whoever computed them."""
    for block in sums:
        mx.eval(block)  # One bucket after the other, as each needs memory for its squares.
    return mx.sqrt(_sum(mx.concatenate(list(sums))))


def _sum(values: mx.array) -> mx.array:
    """Sum of a flat array, block by block: MLX adds on a CPU from one end to the other, which costs a million elements
    three of their seven digits."""
    while values.size > 1:
        whole = values.size // SUM_BLOCK * SUM_BLOCK
        blocks, rest = values[:whole].reshape(-1, SUM_BLOCK).sum(axis=1), values[whole:]
        values = mx.concatenate([blocks, rest.sum(keepdims=True)]) if rest.size else blocks
    return values.sum()
