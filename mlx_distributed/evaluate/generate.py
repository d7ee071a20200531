"""Greedy generation for many prompts at once, to see what a model has learned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import cast

import mlx.core as mx
import mlx.nn as nn

MAX_BATCH_SIZE = 64


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: Collection[int]
) -> list[list[int]]:
    """The most probable continuation of each prompt, token by token, in the order of the prompts.

    Prompts of equal length share a batch (at most `MAX_BATCH_SIZE`), so nothing is padded and the answers are those of
    one prompt at a time. The model is in evaluation mode meanwhile.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: an answer ends there at the latest.
        stop_tokens: an answer ends before any of these.
    """
    was_training = model.training
    model.eval()
    try:
        answers: list[list[int]] = [[] for _ in prompts]
        for rows in _batches(prompts):
            tokens = mx.array([prompts[row] for row in rows])
            for row, answer in zip(rows, _generate_batch(model, tokens, max_new_tokens, stop_tokens), strict=True):
                answers[row] = answer
        return answers
    finally:
        model.train(was_training)


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts of equal length."""
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for _, group in groupby(by_length, key=lambda row: len(prompts[row])):
        rows = list(group)
        for start in range(0, len(rows), MAX_BATCH_SIZE):
            yield rows[start : start + MAX_BATCH_SIZE]


def _generate_batch(
    model: nn.Module, tokens: mx.array, max_new_tokens: int, stop_tokens: Collection[int]
) -> list[list[int]]:
    """Answers to `tokens` [B, L]."""
    # Here, not above: a model to generate with has mlx-lm imported already, in the way that `models.upstream` explains.
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    if tokens.shape[1] > 1:
        model(tokens[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])  # the logits stay unevaluated: [B, L, V] would be large
    answers = Answers(tokens.shape[0], stop_tokens)
    newest = tokens[:, -1:]
    for _ in range(max_new_tokens):
        newest = mx.argmax(model(newest, cache=cache)[:, -1:], axis=-1)
        if not answers.take(newest):
            break
    return answers.tokens


class Answers:
    """Those of a batch, which grow token by token.

    Args:
        num_rows: of the batch.
        stop_tokens: an answer ends before any of these.
    """

    def __init__(self, num_rows: int, stop_tokens: Collection[int]) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._unfinished, self._stop_tokens = set(range(num_rows)), stop_tokens

    def take(self, newest: mx.array) -> bool:
        """Add the newest tokens [B, 1]; whether any row goes on."""
        for row, token in enumerate(cast(list[int], newest.reshape(-1).tolist())):
            if token in self._stop_tokens:
                self._unfinished.discard(row)
            elif row in self._unfinished:
                self.tokens[row].append(token)
        return bool(self._unfinished)
