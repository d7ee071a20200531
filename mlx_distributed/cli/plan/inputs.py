"""What a plan is made from: the configuration, the model without its weights, the data, and the workers."""

from __future__ import annotations

import mlx.core as mx

from mlx_distributed.cli.load import make_plan, scratch_tokenizer
from mlx_distributed.cli.plan.estimate import Load, Workers
from mlx_distributed.cli.plan.machine import measure_flops, memory_bytes
from mlx_distributed.cli.plan.options import parse_flops, parse_link, parse_memory, parse_speeds
from mlx_distributed.cli.plan.work import Model, Shape
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.config import Config
from mlx_distributed.data.plan import Plan as DataPlan
from mlx_distributed.data.sources import Corpus, read_corpus
from mlx_distributed.data.template import read_template
from mlx_distributed.data.tokenize import tokenize_corpus
from mlx_distributed.errors import ConfigError, DataError
from mlx_distributed.models import build_scratch, load, prepare, wrap_tokenizer
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.parallel.data import rank_weights, share

MAX_STEPS = 1000
"""Steps whose micro-batches are looked at."""


def read_run(config: Config) -> tuple[Model, Load, list[str]]:
    """The model, what one copy of it computes in a step, and what there is to say about that.

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
    if config.model.scratch is None:
        model, tokenizer, _ = load(config.model, lazy=True)
    else:
        assert corpus is not None
        tokenizer = wrap_tokenizer(scratch_tokenizer(corpus, config), config.model.scratch["model_type"])
        model, _ = build_scratch(config.model.scratch, tokenizer, config.seed, lazy=True)
    prepare(model, config.method, config.lora, config.seed, lazy=True)
    sizes = [(config.train.micro_batch_size, config.data.max_seq_length - 1)]
    if corpus is not None:
        sizes = _sizes(_data_plan(config, corpus, tokenizer))
    if config.parallel.sync != "step":
        notes.append(
            f"counted as with parallel.sync=step; {config.parallel.sync} takes further copies of what is trained"
        )
    return Model(model), _load(config, sizes), notes


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
    num_workers, num_stages = config.parallel.nproc, config.parallel.pipeline.num_stages
    given_speeds = parse_speeds(speeds, num_workers)
    given_bytes = parse_memory(memory, num_workers, memory_bytes())
    return Workers(
        speeds=tuple(min(given_speeds[stage::num_stages]) for stage in range(num_stages)),
        memory_bytes=tuple(min(given_bytes[stage::num_stages]) for stage in range(num_stages)),
        flops=parse_flops(flops) if flops is not None else measure_flops(dtype),
        link_bytes_per_s=parse_link(link),
    )


def _data_plan(config: Config, corpus: Corpus, tokenizer: TokenizerWrapper) -> DataPlan:
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    return make_plan(config, tokenize_corpus(corpus, tokenizer, config.data))


def _sizes(plan: DataPlan) -> list[tuple[int, int]]:
    """Rows and tokens in a row of micro-batches; the last token of a row only is a target."""
    return [
        (len(rows), max(plan.lengths[row] for row in rows) - 1)
        for step in range(min(plan.num_steps, MAX_STEPS))
        for rows in plan.microbatches(step)
    ]


def _load(config: Config, sizes: list[tuple[int, int]]) -> Load:
    pipeline, num_microbatches = config.parallel.pipeline, config.train.num_microbatches
    num_copies = config.parallel.nproc // pipeline.num_stages
    ranges = share(num_microbatches, rank_weights(config.parallel.share, num_copies))
    areas = [num_rows * length for num_rows, length in sizes]
    longest = areas.index(max(areas))
    shape = Shape(*sizes[longest], pipeline.activations == "keep", config.train.gradient_checkpointing)
    return Load(
        num_microbatches=max(1, *(stop - start for start, stop in ranges)),
        num_sums=max(
            (len(cover(start, end, num_microbatches)) for start, stop in ranges for end in range(start + 1, stop)),
            default=1,
        ),
        shape=shape,
        mean=sum(areas) / len(areas) / areas[longest],
        wire_bytes=2 if pipeline.wire_dtype == "bf16" else 0,
        moments=1 / num_copies if config.optimizer.shard else 1.0,
    )
