"""What a plan is made from: the configuration, the model without its weights, the data, and the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from mlx_distributed.cli.parts import load_tokenizer, load_whole, make_plan
from mlx_distributed.cli.plan.estimate import Load, Workers
from mlx_distributed.cli.plan.machine import measure_flops, memory_bytes, planned_bytes
from mlx_distributed.cli.plan.options import parse_flops, parse_link, parse_memory, parse_speeds
from mlx_distributed.cli.plan.work import Model, Shape
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.config import Config
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
    if config.parallel.sync != "step":
        notes.append(
            f"counted as with parallel.sync=step; {config.parallel.sync} takes further copies of what is trained"
        )
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


def batch_shapes(config: Config, rows: TokenizedCorpus) -> list[tuple[int, int]]:
    """Rows and tokens in a row, padding too, of the micro-batches of a run, or of its first `MAX_STEPS`."""
    plan = make_plan(config, rows)
    phases = Phases(config, plan, rows.train)
    works = [phases.work(step) for step in range(min(plan.num_steps, MAX_STEPS))]
    return [phases.batch(work, number).tokens.shape for work in works for number in range(len(work.microbatches))]


def make_load(config: Config, rows: TokenizedCorpus | None) -> Load:
    """What one copy of the model computes in a step; without rows, micro-batches are as long as they may be."""
    train, pipeline = config.train, config.parallel.pipeline
    if rows is not None:
        shapes, num_microbatches = batch_shapes(config, rows), make_plan(config, rows).num_microbatches
    else:
        limit = config.data.max_seq_length
        num_rows = train.micro_batch_size if train.micro_batch_tokens is None else train.micro_batch_tokens // limit
        shapes, num_microbatches = [(num_rows, limit)], -(-train.global_batch_size // num_rows)
    sizes = [(num_rows, length - 1) for num_rows, length in shapes]  # The last token of a row only is a target.
    num_copies = config.parallel.size // pipeline.num_stages
    ranges = share(num_microbatches, rank_weights(config.parallel.share, num_copies))
    areas = [num_rows * length for num_rows, length in sizes]
    longest = areas.index(max(areas))
    most = max(1, *(stop - start for start, stop in ranges))
    one_piece = pipeline.num_stages == 1
    # Of every copy, the sums that it holds before each of its micro-batches but, in a pipeline, the first.
    first = 0 if one_piece else 1
    held = [
        [len(cover(start, end, num_microbatches)) for end in range(start + 1 - one_piece, stop)]
        for start, stop in ranges
    ]
    shape = Shape(
        *sizes[longest],
        keep=pipeline.activations == "keep" and not one_piece,
        checkpointed=config.train.gradient_checkpointing,
        order="buckets" if one_piece else "stage",
    )
    return Load(
        num_microbatches=most,
        num_sums=max((num for before in held for num in (before[:-1] if one_piece else before)), default=first),
        shape=shape,
        mean=sum(areas) / len(areas) / areas[longest],
        wire_bytes={"fp32": 0, "bf16": 2, "int8": 1}[pipeline.wire_dtype],
        moments=1 / num_copies if config.optimizer.shard else 1.0,
        num_sums_last=max(before[-1] for before in held) + 1 if one_piece else 0,
    )
