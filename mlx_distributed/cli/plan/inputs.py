"""What a plan is made from: the configuration, the model without its weights, the data, and the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import mlx.core as mx

from mlx_distributed.cli.parts import load_tokenizer, load_whole, make_plan
from mlx_distributed.cli.plan.estimate import Load, Whole, Workers
from mlx_distributed.cli.plan.evaluation import make_evaluation
from mlx_distributed.cli.plan.machine import measure_flops, memory_bytes, planned_bytes
from mlx_distributed.cli.plan.options import parse_flops, parse_link, parse_memory, parse_speeds
from mlx_distributed.cli.plan.update import Update
from mlx_distributed.cli.plan.work import Model, Shape, Sums, largest
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.config import Config
from mlx_distributed.data.batch import Batch
from mlx_distributed.data.sources import read_corpus
from mlx_distributed.data.tokenize import TokenizedCorpus, tokenize_corpus
from mlx_distributed.errors import ConfigError, DataError
from mlx_distributed.parallel.data import rank_weights, share
from mlx_distributed.train.phases import Phases

Number = TypeVar("Number", int, float)

MAX_STEPS = 1000
"""Steps whose micro-batches are looked at."""


def read_run(config: Config) -> tuple[Callable[[Config], tuple[Model, Load]], list[str]]:
    """What makes, of this configuration or of one that differs in what is trained alone, the model and what one copy of
    it computes in a step; and what there is to say about that.

    Where the data cannot be read, micro-batches are taken to be as long as they may be; a model from scratch needs the
    data, as its tokenizer is trained from them.

    Raises:
        ConfigError, DataError: something was refused.
    """
    notes: list[str] = []
    corpus = None
    try:
        corpus = read_corpus(config.data, config.seed)
    except (ConfigError, DataError) as error:
        if config.model.scratch is not None:
            raise
        notes.append(f"the data cannot be read, so micro-batches are as long as they may be: {error}")
    tokenizer = load_tokenizer(config, corpus)
    rows = None if corpus is None else tokenize_corpus(corpus, tokenizer, config.data)
    return lambda changed: (Model(load_whole(changed, tokenizer)), make_load(changed, rows)), notes


def read_workers(
    config: Config, dtype: mx.Dtype, speeds: str | None, memory: str | None, flops: str | None, link: str
) -> Workers:
    """The workers of one copy of the model: where there are several, the slowest and the smallest of each stage.

    Args:
        config: of the run.
        dtype: that the model computes with.
        speeds, memory, flops, link: as given on the command line.

    Raises:
        ConfigError: one of them makes no sense.
    """
    num_workers, pipeline = config.parallel.size, config.parallel.pipeline
    given_speeds = parse_speeds(speeds, num_workers)
    if speeds is None and not isinstance(pipeline.speeds, str):
        given_speeds = pipeline.speeds
    budget = config.train.memory_budget
    default_bytes = memory_bytes() if budget is None else planned_bytes(budget)
    given_bytes = parse_memory(memory, num_workers, default_bytes)
    return Workers(
        speeds=by_stage(given_speeds, pipeline.num_stages),
        memory_bytes=by_stage(given_bytes, pipeline.num_stages),
        flops=parse_flops(flops) if flops is not None else measure_flops(dtype),
        link_bytes_per_s=parse_link(link),
    )


def by_stage(values: Sequence[Number], num_stages: int) -> tuple[Number, ...]:
    """Of the worker of each stage, where there are several the least: neighbours are the stages of one copy."""
    return tuple(min(values[stage::num_stages]) for stage in range(num_stages))


def all_batches(config: Config, rows: TokenizedCorpus) -> Iterator[Batch]:
    """The micro-batches of a run, or of its first `MAX_STEPS`."""
    plan = make_plan(config, rows)
    phases = Phases(config, plan, rows.train)
    works = (phases.work(step) for step in range(min(plan.num_steps, MAX_STEPS)))
    return (phases.batch(work, number) for work in works for number in range(len(work.microbatches)))


def make_load(config: Config, rows: TokenizedCorpus | None) -> Load:
    """What one copy of the model computes in a step; without rows, micro-batches are as long as they may be."""
    train, pipeline = config.train, config.parallel.pipeline
    one_piece = pipeline.num_stages == 1
    form = Shape(
        num_rows=1,
        length=1,
        keep=pipeline.activations == "keep" and not one_piece,
        checkpointed=train.gradient_checkpointing,
        order="buckets" if one_piece else "stage",
    )
    if rows is not None:
        batches, num_microbatches = all_batches(config, rows), make_plan(config, rows).num_microbatches
        shapes = [_shape(form, len(batch.tokens), batch.tokens.shape[1], batch.groups) for batch in batches]
    else:
        limit = config.data.max_seq_length
        num_rows = train.micro_batch_size if train.micro_batch_tokens is None else train.micro_batch_tokens // limit
        shapes, num_microbatches = [_shape(form, num_rows, limit)], -(-train.global_batch_size // num_rows)
    num_copies = config.parallel.size // pipeline.num_stages
    diloco = config.parallel.sync == "diloco"  # Whoever is free takes the next of these parts.
    weights = [1.0] * num_copies if diloco else rank_weights(config.parallel.share, num_copies)
    ranges = share(num_microbatches, weights)
    # Of every copy, the sums that it holds before and after each of its micro-batches; with `diloco` they are its own.
    trees = [(0, stop - start, stop - start) if diloco else (start, stop, num_microbatches) for start, stop in ranges]
    held = [
        [len(cover(start, end, num)) for end in range(start, stop + 1)] for start, stop, num in trees if stop > start
    ]
    return Load(
        num_microbatches=max(len(counts) - 1 for counts in held),
        num_sums=max((num for counts in held for num in counts[1:-1]), default=1),
        shapes=largest(shapes),
        num_tokens=sum(shape.num_tokens for shape in shapes) / len(shapes),
        wire_bytes={"fp32": 0, "bf16": 2, "int8": 1}[pipeline.wire_dtype],
        whole=_whole(config, held, rows) if one_piece else None,
    )


def _shape(form: Shape, num_rows: int, length: int, groups: tuple[tuple[int, ...], ...] | None = None) -> Shape:
    """Of a micro-batch; the last token of a row is a target alone."""
    return replace(form, num_rows=num_rows, length=length - 1, groups=groups)


def _whole(config: Config, held: Sequence[Sequence[int]], rows: TokenizedCorpus | None) -> Whole:
    """Of the copy that holds most.

    Args:
        config: of the run.
        held: of each, the sums before and after its micro-batches.
        rows: that are trained on and evaluated, where they are known.
    """
    sums = [[Sums(before, before + 1 - after) for before, after in pairwise(counts)] for counts in held]
    worst = lambda some: max(some, key=lambda each: (each.num_held, -each.num_added))  # noqa: E731
    last = worst([own[-1] for own in sums])
    if config.parallel.sync != "delayed":  # What is held leaves with the gradient.
        last = Sums(last.num_held, last.num_held)
    before = [each for own in sums for each in own[:-1]]
    return Whole(
        sums=last,
        sums_before=worst(before) if before else None,
        update=Update(config, max(counts[-1] for counts in held)),
        evaluation=make_evaluation(config, [] if rows is None else rows.validation),
    )
