"""What a run trains, and on what: data, tokenizer, model and plan, the same on every rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.cli.stages import Staged, cut_into_stages
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config, to_dict
from mlx_distributed.config.checks import workers_key
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.sources import Corpus, read_corpus
from mlx_distributed.data.stream import AnyPlan, AnyRows, open_stream_plan
from mlx_distributed.data.template import read_template
from mlx_distributed.data.tokenize import TokenizedCorpus, tokenize_corpus
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import (
    add_noise,
    build_scratch,
    check_range,
    checkpoint_layers,
    compute_in,
    fingerprint,
    isolate,
    load,
    prepare,
    read_tokenizer,
    train_tokenizer,
    wrap_tokenizer,
)
from mlx_distributed.models.prepare import join_fingerprints, weigh
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.train.agreement import broadcast_bytes, check_same


@dataclass(frozen=True)
class Loaded:
    """Ready to train."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    architecture: Mapping[str, Any]
    """As in config.json."""
    rows: TokenizedCorpus
    """All that is read before the run: with `data.streaming`, of the training rows the first alone."""
    train: AnyRows
    """The rows that the plan points to."""
    plan: AnyPlan
    facts: Mapping[str, str]
    """What must stay the same when the run is resumed."""
    example_prompt: str
    """What the user says first, for people to try the model with."""
    staged: Staged | None = None
    """Where the model is cut into stages, this worker's; `model` is its part then."""
    expected_bytes: int | None = None
    """That MLX will hold at most, where `train.memory_budget` is set and the model is in one piece."""


def load_rows(config: Config) -> tuple[TokenizerWrapper, TokenizedCorpus]:
    """The tokenizer and the rows of `load_all`, without the model: for looking at the data before a run.

    Raises:
        ConfigError, DataError: as a run would.
    """
    corpus = read_corpus(config.data, config.seed)
    tokenizer = load_tokenizer(config, corpus)
    return tokenizer, tokenize_corpus(corpus, tokenizer, config.data)


def load_tokenizer(config: Config, corpus: Corpus | None) -> TokenizerWrapper:
    """The tokenizer of a run, with its chat template; no weights are read, nor downloaded.

    Args:
        config: of the run.
        corpus: what the tokenizer of a model from scratch is trained from; nobody else needs it.

    Raises:
        ConfigError: it cannot be loaded.
        DataError: `data.chat_template` cannot be read.
    """
    if config.model.scratch is None:
        tokenizer = read_tokenizer(config.model)
    else:
        assert corpus is not None
        tokenizer = wrap_tokenizer(scratch_tokenizer(corpus, config), config.model.scratch["model_type"])
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    return tokenizer


def load_all(
    config: Config, comm: Communicator, pipeline: Communicator | None = None, machines: Sequence[str] = ()
) -> Loaded:
    """Read the data, load or build the model, and make it trainable.

    Args:
        config: of the run.
        comm: of all workers.
        pipeline: of those that have one copy of the model between them, where it is cut into stages.
        machines: by rank, that which it is on; none where all are on one.

    Raises:
        ConfigError, DataError: something was refused, or some rank has other data or another model.
    """
    corpus = read_corpus(config.data, config.seed)
    lazy = pipeline is not None
    if config.model.scratch is None:
        model, tokenizer, architecture = load(config.base, lazy=lazy)
    else:
        data = scratch_tokenizer(corpus, config) if comm.rank == 0 else None
        data = broadcast_bytes(data, comm, "the tokenizer")
        tokenizer = wrap_tokenizer(data, config.model.scratch["model_type"])
        model, architecture = build_scratch(config.model.scratch, tokenizer, config.seed, lazy=lazy)
    if config.data.chat_template is not None:
        # So that the finished model is asked in the form that it was taught in.
        tokenizer.chat_template = read_template(config.data.chat_template)
    rows = tokenize_corpus(corpus, tokenizer, config.data)
    prepare(model, config.method, config.lora, config.seed, lazy=lazy)
    compute_in(model, config.precision)
    staged = None
    parts = [model]
    if pipeline is not None:
        from mlx_distributed.cli.plan.settle import settle  # A plan is made of what this file loads.

        settled = settle(model, config, None if config.data.streaming else rows, comm, machines)
        staged = cut_into_stages(model, config, settled.settings, pipeline, settled.reason)
        model, parts = staged.model, [*staged.pipeline.stages.values()]
    expected_bytes = None
    if config.train.memory_budget is not None and pipeline is None:
        from mlx_distributed.cli.plan.budget import expect  # As above.

        known = None if config.data.streaming else rows
        expected_bytes = expect(config, known, config.train.memory_budget, lambda other: load_whole(other, tokenizer))
    for part in parts:
        check_range(part)
        if config.data.packing:
            isolate(part)
        if config.train.neftune_noise_alpha is not None:
            add_noise(part, config.train.neftune_noise_alpha)
        if config.train.gradient_checkpointing:
            checkpoint_layers(part)
    model.train()
    plan: AnyPlan = make_plan(config, rows)
    train: AnyRows = rows.train
    train_digest = rows.train_digest
    if config.data.streaming:
        plan = open_stream_plan(config, tokenizer)
        train = plan.rows
        train_digest = hashlib.sha256(f"{train_digest}{plan.identity}".encode()).hexdigest()
    facts = {
        "data": train_digest,
        "model": fingerprint(model, architecture) if staged is None else _fingerprint(staged, architecture),
        "method": config.method if config.method == "full" else f"{config.method} {asdict(config.lora)}",
        "seed": str(config.seed),
        "train.global_batch_size": str(config.train.global_batch_size),
        "train.micro_batch_size": str(config.train.micro_batch_size),
    }
    if config.train.micro_batch_tokens is not None:
        facts["train.micro_batch_tokens"] = str(config.train.micro_batch_tokens)
    if config.data.packing:
        facts["data.packing"] = "true"
    if config.precision != "fp32":
        facts["precision"] = config.precision
    if config.model.quantize.bits is not None:
        facts["model.quantize"] = f"{config.model.quantize.bits} bits in groups of {config.model.quantize.group_size}"
    if config.train.neftune_noise_alpha is not None:
        facts["train.neftune_noise_alpha"] = f"{config.train.neftune_noise_alpha:g}"
    if config.parallel.sync != "step":
        facts["parallel.sync"] = sync_fact(config)
    # A run may go on with other settings, but never with other ones on some of its workers.
    settings = {name: to_dict(config)[name] for name in ("train", "optimizer", "scheduler", "eval", "checkpoint")}
    check_same(facts | {"validation data": rows.validation_digest, "configuration": json.dumps(settings)}, comm)
    return Loaded(
        model, tokenizer, architecture, rows, train, plan, facts, example_prompt(corpus), staged, expected_bytes
    )


def load_whole(config: Config, tokenizer: TokenizerWrapper) -> nn.Module:
    """The model of `load_all` before it was cut into stages or trained; nothing of it is evaluated."""
    if config.model.scratch is None:
        model, _, _ = load(config.base, lazy=True)
    else:
        model, _ = build_scratch(config.model.scratch, tokenizer, config.seed, lazy=True)
    prepare(model, config.method, config.lora, config.seed, lazy=True)
    compute_in(model, config.precision)
    return model


def _fingerprint(staged: Staged, architecture: Mapping[str, Any]) -> str:
    """That of the whole model, which is spread over the stages."""
    stages = staged.pipeline.stages.values()
    mine = json.dumps([weigh(stage) for stage in stages]).encode()
    gathered = staged.pipeline.comm.all_gather(mx.array(np.frombuffer(mine, np.uint8)), "what the model weighs")
    weighed = [stage for array in gathered for stage in json.loads(np.asarray(array).tobytes())]
    return join_fingerprints(weighed, architecture)


def sync_fact(config: Config) -> str:
    """How workers agree, as far as what is under way between them depends on it."""
    if config.parallel.sync == "delayed":
        return "delayed"
    diloco = config.parallel.diloco
    return f"diloco with {diloco.fragments} fragments every {diloco.sync_every}, {diloco.overlap_steps} late"


def scratch_tokenizer(corpus: Corpus, config: Config) -> bytes:
    """A tokenizer trained on the training rows."""
    assert config.model.scratch is not None
    texts = (message.content for row in corpus.train for message in row.messages)
    return train_tokenizer(texts, config.model.scratch["vocab_size"])


def example_prompt(corpus: Corpus) -> str:
    """The first thing that a user says in the validation rows, or where there are none in the training rows."""
    conversation = (corpus.validation or corpus.train)[0]
    return next((message.content for message in conversation.messages if message.role == "user"), "")


def make_plan(config: Config, rows: TokenizedCorpus) -> Plan:
    """The micro-batches of every step.

    Raises:
        ConfigError: `train.micro_batch_tokens` leaves some worker without any.
    """
    plan = Plan(
        lengths=[len(row.tokens) for row in rows.train],
        spans=rows.weights,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        micro_batch_tokens=config.train.micro_batch_tokens,
        packing=config.data.packing,
    )
    limit, num_stages = config.train.micro_batch_tokens, config.parallel.pipeline.num_stages
    if limit is not None and plan.num_microbatches < config.parallel.size // num_stages:
        raise ConfigError(
            f"{workers_key(config.parallel)}={config.parallel.size}: a step of "
            f"train.global_batch_size={plan.global_batch_size} rows has at most {plan.num_microbatches} micro-batches "
            f"of train.micro_batch_tokens={limit}, so a worker would have nothing to do; use "
            f"{plan.num_microbatches * num_stages} workers or fewer, fewer tokens, or more rows"
        )
    return plan
