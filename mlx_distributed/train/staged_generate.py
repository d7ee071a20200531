"""Greedy generation with a model that is spread over a pipeline; the answers are those of `evaluate.generate`.

A worker keeps keys and values for its own layers. The last one finds the next tokens and tells the others. Several
batches are under way, which take turns: while one is on its way through the stages, a worker computes for another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from itertools import islice

import mlx.core as mx

from mlx_distributed.errors import CommError
from mlx_distributed.evaluate.generate import Answers
from mlx_distributed.models.stages import make_cache
from mlx_distributed.train.pipeline import Pipeline

_WHAT = "the generated answers"

_Turns = Generator[None, None, list[list[int]]]
"""Pauses where it would wait for the stages that follow; its value is the answers."""


def generate_staged(
    pipeline: Pipeline,
    batches: Sequence[list[list[int]]],
    max_new_tokens: int,
    stop_tokens: Collection[int],
) -> list[list[list[int]]]:
    """The most probable continuation of each prompt of each batch, the same on all workers of the pipeline. The stages
    are in evaluation mode.

    Args:
        pipeline: as many batches as it has workers are under way.
        batches: of prompts of equal length, at least one token; the same on all workers.
        max_new_tokens: an answer ends there at the latest.
        stop_tokens: an answer ends before any of these.

    Raises:
        CommError: a worker of the pipeline is lost, or sent something else than what was due.
    """
    answers: list[list[list[int]]] = [[] for _ in batches]
    waiting: Iterator[tuple[int, _Turns]] = (
        (index, _answer(pipeline, mx.array(prompts), max_new_tokens, stop_tokens))
        for index, prompts in enumerate(batches)
    )
    under_way = deque(islice(waiting, pipeline.comm.size))
    while under_way:
        index, turns = under_way.popleft()
        try:
            next(turns)
            under_way.append((index, turns))
        except StopIteration as done:
            answers[index] = done.value
            under_way.extend(islice(waiting, 1))
    return answers


def _answer(pipeline: Pipeline, tokens: mx.array, max_new_tokens: int, stop_tokens: Collection[int]) -> _Turns:
    """Answers to `tokens` [B, L]."""
    caches = {number: make_cache(stage) for number, stage in pipeline.stages.items()}

    def put_through(tokens: mx.array) -> mx.array | None:
        def apply(number: int, hidden: mx.array | None) -> mx.array:
            return pipeline.stages[number](tokens if hidden is None else hidden, cache=caches[number])

        return pipeline.through(apply, (tokens.shape[0], tokens.shape[1]), _WHAT)

    if tokens.shape[1] > 1:
        put_through(tokens[:, :-1])
        mx.eval([cache.state for of_stage in caches.values() for cache in of_stage])  # the logits would be large
    answers = Answers(tokens.shape[0], stop_tokens)
    newest = tokens[:, -1:]
    for _ in range(max_new_tokens):
        logits = put_through(newest)
        if logits is not None:
            newest = mx.argmax(logits[:, -1:], axis=-1)
            mx.eval(newest)
        yield
        newest = _told(pipeline, newest)
        if not answers.take(newest):
            break
    return answers.tokens


def _told(pipeline: Pipeline, newest: mx.array) -> mx.array:
    """The tokens [B, 1] that the worker of the last stage has found."""
    comm, (due, dtype) = pipeline.comm, (newest.shape, mx.uint32)
    last = comm.size - 1
    told = comm.broadcast(newest, last, _WHAT)
    if told.shape != due or told.dtype != dtype:
        reason = f"sent {told.dtype}{tuple(told.shape)} where {dtype}{tuple(due)} was due"
        raise CommError(f"broadcast of {_WHAT}", last, comm.generation, 0.0, reason)
    return told
