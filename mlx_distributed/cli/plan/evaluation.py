"""What an evaluation takes beside the state: passes over the validation rows, and the answers to their prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_distributed.cli.plan.graph import trace
from mlx_distributed.cli.plan.work import Shape, largest, zeros
from mlx_distributed.config import Config
from mlx_distributed.data.batch import by_length
from mlx_distributed.data.tokenize import Row, prompt_and_reference
from mlx_distributed.models.precision import lower
from mlx_distributed.models.stages import Stage, make_cache
from mlx_distributed.train.evaluation import GENERATE_BATCH
from mlx_distributed.train.loss import summed_loss


@dataclass(frozen=True)
class Evaluation:
    """Of a model in one piece."""

    batches: tuple[Shape, ...]
    """For the loss, those micro-batches that may take the most memory."""
    prompts: tuple[Shape, ...]
    """Likewise those that are answered at a time."""
    max_new_tokens: int

    def peak_bytes(self, model: Stage) -> int:
        """The most that is held, with a copy of what is trained where the model computes in 16 bits.

        Args:
            model: all of it, as zeros; is changed.
        """
        lowered = lower(model, model.trainable_parameters())
        copied = _arrays(lowered) if getattr(model, "precision", "fp32") != "fp32" else []
        model.eval()
        model.update(tree_map(lambda array: zeros(array.shape, array.dtype), lowered))

        def loss(tokens: mx.array) -> list[list[mx.array]]:
            return [[summed_loss(model, tokens, mx.ones(tokens.shape, mx.bool_))]]

        def read(tokens: mx.array) -> list[list[mx.array]]:
            caches = make_cache(model)
            model(tokens, cache=caches)
            return [_arrays([cache.state for cache in caches])]

        peaks = [trace(loss, [_tokens(batch, 1)])[0].peak_bytes for batch in self.batches]
        for prompt in self.prompts:
            peaks.append(trace(read, [_tokens(prompt)])[0].peak_bytes)
            peaks.append(trace(read, [_tokens(prompt, self.max_new_tokens)])[0].held_bytes)
        return max(peaks, default=0) + sum(array.nbytes for array in copied)


def make_evaluation(config: Config, rows: Sequence[Row]) -> Evaluation:
    """Of these rows for validation."""
    batches = by_length(rows, config.train.micro_batch_size, config.train.micro_batch_tokens)
    asked = rows[: config.eval.max_examples] if config.eval.generate else []
    lengths = Counter(len(prompt_and_reference(row)[0]) for row in asked)
    return Evaluation(
        largest([_shape(len(batch), max(len(row.tokens) for row in batch)) for batch in batches]),
        largest([_shape(min(num, GENERATE_BATCH), length) for length, num in lengths.items()]),
        config.eval.max_new_tokens,
    )


def _shape(num_rows: int, length: int) -> Shape:
    """Without the last token, which is a target alone, or what is answered to."""
    return Shape(num_rows, max(length - 1, 1), keep=False, checkpointed=False)


def _tokens(shape: Shape, more: int = 0) -> mx.array:
    return zeros((shape.num_rows, shape.length + more), mx.int32)


def _arrays(tree: Any) -> list[mx.array]:
    leaves: dict[str, Any] = dict(tree_flatten(tree))
    return [leaf for leaf in leaves.values() if isinstance(leaf, mx.array)]
