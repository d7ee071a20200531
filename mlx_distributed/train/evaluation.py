"""Evaluation over all workers: the same figures on any number of them, as batches are fixed and sums canonical."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import from_buckets, make_layout, to_buckets
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.config.schema import EvalConfig
from mlx_distributed.data.batch import collate
from mlx_distributed.data.tokenize import Row, prompt_and_reference
from mlx_distributed.evaluate.generate import generate
from mlx_distributed.evaluate.score import score
from mlx_distributed.models.precision import lower
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.parallel.data import share
from mlx_distributed.train.best import EVAL_LOSS, EVAL_PERPLEXITY
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.pipeline import Microbatch, Pipeline
from mlx_distributed.train.staged_generate import generate_staged
from mlx_distributed.train.tally import Tally

T = TypeVar("T")

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
    batches: Sequence[Sequence[Row]],
    comm: Communicator,
    pipeline: Pipeline | None = None,
) -> dict[str, float]:
    """Loss in nats per label token and perplexity over all rows, in the order of the micro-batches.

    Args:
        model: or what this worker has of it.
        batches: rows to be evaluated on, in micro-batches.
        comm: over which they are shared.
        pipeline: that the model is spread over; None where this worker has all of it.
    """
    start, stop = share(len(batches), [1.0] * comm.size)[comm.rank]
    tally = Tally.empty(len(batches))
    with evaluating(model):
        own = [collate(batch) for batch in batches[start:stop]]
        tally.num_tokens[start:stop] = [batch.num_labels for batch in own]
        arrays = [(mx.array(batch.tokens), mx.array(batch.loss_mask)) for batch in own]
        if pipeline is None:
            tally.losses[start:stop] = [summed_loss(model, *pair).item() for pair in arrays]
        else:
            microbatches = [Microbatch(*pair, 0) for pair in arrays]
            tally.losses[start:stop] = list(pipeline.losses(microbatches, "the validation loss"))
    layout = make_layout(tally.part((0, 0)))
    parts = {node: to_buckets(layout, tally.part(node)) for node in cover(start, stop, len(batches))}
    held = ({node: buckets[i] for node, buckets in parts.items()} for i in range(len(layout)))
    reduced = Tally.pop(from_buckets(layout, comm.all_reduce(layout, len(batches), held, "the validation loss")))
    if pipeline is not None:
        pipeline.tell(reduced, "the validation loss")
    loss = reduced.mean_loss
    return {EVAL_LOSS: loss, EVAL_PERPLEXITY: math.exp(loss) if loss < 700 else math.inf}


def evaluate_generation(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    rows: Sequence[Row],
    max_new_tokens: int,
    comm: Communicator,
    pipeline: Pipeline | None = None,
) -> list[Sample]:
    """Greedy answers to the prompts of `rows`, one sample per row in their order, the same on every rank; `comm` and
    `pipeline` are as in `evaluate_loss`."""
    pairs = [prompt_and_reference(row) for row in rows]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    batches = [
        list(batch)
        for _, group in itertools.groupby(order, key=lambda i: len(pairs[i][0]))
        for batch in _cut(list(group), GENERATE_BATCH)
    ]
    answers_by_row: dict[int, list[int]] = {}
    with evaluating(model):
        # In rounds, so that nobody waits for long without a word of a slow worker, and gives it up.
        for some in _cut(batches, comm.size * (1 if pipeline is None else pipeline.comm.size)):
            start, stop = share(len(some), [1.0] * comm.size)[comm.rank]
            prompts = [[[int(token) for token in pairs[i][0]] for i in batch] for batch in some[start:stop]]
            if pipeline is None:
                answers = [generate(model, batch, max_new_tokens, tokenizer.eos_token_ids) for batch in prompts]
            else:
                answers = generate_staged(pipeline, prompts, max_new_tokens, tokenizer.eos_token_ids)
            records: list[int] = []  # index, number of tokens, tokens; and so on
            for batch, of_batch in zip(some[start:stop], answers, strict=True):
                for i, tokens in zip(batch, of_batch, strict=True):
                    records += [i, len(tokens), *tokens]
            for gathered in comm.all_gather(mx.array(records, mx.int32), "the generated answers"):
                answers_by_row |= dict(_records(np.asarray(gathered).tolist()))
    return [
        Sample(tokenizer.decode(list(prompt)), tokenizer.decode(answers_by_row[i]), tokenizer.decode(list(reference)))
        for i, (prompt, reference) in enumerate(pairs)
    ]


@dataclass(frozen=True)
class Scored:
    """How the answers of an evaluation compare with the data."""

    metrics: dict[str, float]
    """A figure for each of `eval.metrics`, such as `eval/bleu`, with the ends of its interval, `eval/bleu_low` and
    `eval/bleu_high`."""
    signatures: dict[str, str]
    """How they were computed, where that has to be said."""
    records: list[dict[str, Any]]
    """For `Tracker.samples`."""


def score_samples(samples: Sequence[Sample], settings: EvalConfig) -> Scored:
    """Compare answers with the data.

    Args:
        samples: at least one.
        settings: which metrics, and how.
    """
    generated, references = [sample.generated for sample in samples], [sample.reference for sample in samples]
    scored = Scored({}, {}, [{"row": row, **asdict(sample)} for row, sample in enumerate(samples)])
    for name in dict.fromkeys(settings.metrics):
        key, found = f"eval/{name}", score(name, generated, references, settings.bleu_tokenize, settings.rouge_tokenize)
        scored.metrics.update({key: found.value, f"{key}_low": found.low, f"{key}_high": found.high})
        if found.signature:
            scored.signatures[key] = found.signature
        for record, value in zip(scored.records, found.each, strict=True):
            record[key] = value
    return scored


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and back to training afterwards; a copy of what is trained is cast once for all calls."""
    trained = model.trainable_parameters()
    model.eval()
    model.update(lower(model, trained))
    try:
        yield
    finally:
        model.update(trained)
        model.train()


def _cut(items: list[T], length: int) -> Iterator[list[T]]:
    for at in range(0, len(items), length):
        yield items[at : at + length]


def _records(flat: list[int]) -> Iterator[tuple[int, list[int]]]:
    at = 0
    while at < len(flat):
        index, num_tokens = flat[at], flat[at + 1]
        yield index, flat[at + 2 : at + 2 + num_tokens]
        at += 2 + num_tokens
