"""Evaluation over all workers: the same figures on any number of them, as batches are fixed and sums canonical."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import from_buckets, make_layout, to_buckets
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.data.tokenize import Row, collate, prompt_and_reference
from mlx_distributed.evaluate.generate import generate
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.parallel.data import share
from mlx_distributed.train.checkpoint import EVAL_LOSS
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.pipeline import Microbatch, Pipeline
from mlx_distributed.train.tally import Tally

GENERATE_BATCH = 32
"""Prompts decoded at a time. Fixed, as another size may round differently and flip a near tie."""


@dataclass(frozen=True)
class Sample:
    """One generated answer beside the one in the data."""

    prompt: str
    generated: str
    reference: str

    @property
    def exact(self) -> bool:
        """Whether the texts are equal but for white space around them."""
        return self.generated.strip() == self.reference.strip()


def evaluate_loss(
    model: nn.Module,
    rows: Sequence[Row],
    micro_batch_size: int,
    comm: Communicator,
    pipeline: Pipeline | None = None,
) -> dict[str, float]:
    """Loss in nats per label token and perplexity over all rows, in a fixed order.

    Args:
        model: or what this worker has of it.
        rows: to be evaluated on.
        micro_batch_size: sequences at a time.
        comm: over which the rows are shared.
        pipeline: that the model is spread over; None where this worker has all of it.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].tokens))
    batches = [order[at : at + micro_batch_size] for at in range(0, len(order), micro_batch_size)]
    start, stop = share(len(batches), [1.0] * comm.size)[comm.rank]
    tally = Tally.empty(len(batches))
    with evaluating(model):
        own = [collate([rows[row] for row in batch]) for batch in batches[start:stop]]
        tally.num_tokens[start:stop] = [loss_mask[:, 1:].sum() for _, loss_mask in own]
        if pipeline is None:
            tally.losses[start:stop] = [summed_loss(model, *map(mx.array, batch)).item() for batch in own]
        else:
            microbatches = [Microbatch(mx.array(tokens), mx.array(loss_mask), 0) for tokens, loss_mask in own]
            tally.losses[start:stop] = list(pipeline.losses(microbatches, "the validation loss"))
    layout = make_layout(tally.part((0, 0)))
    parts = {node: to_buckets(layout, tally.part(node)) for node in cover(start, stop, len(batches))}
    held = ({node: buckets[i] for node, buckets in parts.items()} for i in range(len(layout)))
    reduced = Tally.pop(from_buckets(layout, comm.all_reduce(layout, len(batches), held, "the validation loss")))
    if pipeline is not None:
        pipeline.tell(reduced, "the validation loss")
    loss = reduced.mean_loss
    return {EVAL_LOSS: loss, "eval/perplexity": math.exp(loss) if loss < 700 else math.inf}


def evaluate_generation(
    model: nn.Module, tokenizer: TokenizerWrapper, rows: Sequence[Row], max_new_tokens: int, comm: Communicator
) -> list[Sample]:
    """Greedy answers to the prompts of `rows`, one sample per row in their order, the same on every rank."""
    pairs = [prompt_and_reference(row) for row in rows]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    batches = [
        list(batch)
        for _, group in itertools.groupby(order, key=lambda i: len(pairs[i][0]))
        for batch in _cut(list(group), GENERATE_BATCH)
    ]
    start, stop = share(len(batches), [1.0] * comm.size)[comm.rank]
    records: list[int] = []  # index, number of tokens, tokens; and so on
    with evaluating(model):
        for batch in batches[start:stop]:
            prompts = [[int(token) for token in pairs[i][0]] for i in batch]
            answers = generate(model, prompts, max_new_tokens, tokenizer.eos_token_ids)
            for i, tokens in zip(batch, answers, strict=True):
                records += [i, len(tokens), *tokens]
    answers_by_row: dict[int, list[int]] = {}
    for gathered in comm.all_gather(mx.array(records, mx.int32), "the generated answers"):
        answers_by_row |= dict(_records(np.asarray(gathered).tolist()))
    return [
        Sample(tokenizer.decode(list(prompt)), tokenizer.decode(answers_by_row[i]), tokenizer.decode(list(reference)))
        for i, (prompt, reference) in enumerate(pairs)
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and back to training afterwards."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def _cut(items: list[int], length: int) -> Iterator[list[int]]:
    for at in range(0, len(items), length):
        yield items[at : at + length]


def _records(flat: list[int]) -> Iterator[tuple[int, list[int]]]:
    at = 0
    while at < len(flat):
        index, num_tokens = flat[at], flat[at + 1]
        yield index, flat[at + 2 : at + 2 + num_tokens]
        at += 2 + num_tokens
