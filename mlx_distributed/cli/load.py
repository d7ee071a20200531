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

from mlx_distributed.cli.parts import example_prompt, load_whole, make_plan, scratch_tokenizer
from mlx_distributed.cli.plan.budget import expect
from mlx_distributed.cli.plan.settle import settle
from mlx_distributed.cli.stages import Staged, cut_into_stages
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config, to_dict
from mlx_distributed.data.sources import read_corpus
from mlx_distributed.data.stream import AnyPlan, AnyRows, open_stream_plan
from mlx_distributed.data.template import read_template
from mlx_distributed.data.tokenize import TokenizedCorpus, tokenize_corpus
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
        settled = settle(model, config, None if config.data.streaming else rows, comm, machines)
        staged = cut_into_stages(model, config, settled.settings, pipeline, settled.reason)
        model, parts = staged.model, [*staged.pipeline.stages.values()]
    expected_bytes = None
    if config.train.memory_budget is not None and pipeline is None:
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
    facts = _facts(
        config, train_digest, fingerprint(model, architecture) if staged is None else _fingerprint(staged, architecture)
    )
    # A run may go on with other settings, but never with other ones on some of its workers.
    settings = {name: to_dict(config)[name] for name in ("train", "optimizer", "scheduler", "eval", "checkpoint")}
    check_same(facts | {"validation data": rows.validation_digest, "configuration": json.dumps(settings)}, comm)
    return Loaded(
        model, tokenizer, architecture, rows, train, plan, facts, example_prompt(corpus), staged, expected_bytes
    )


def _fingerprint(staged: Staged, architecture: Mapping[str, Any]) -> str:
    """That of the whole model, which is spread over the stages."""
    stages = staged.pipeline.stages.values()
    mine = json.dumps([weigh(stage) for stage in stages]).encode()
    gathered = staged.pipeline.comm.all_gather(mx.array(np.frombuffer(mine, np.uint8)), "what the model weighs")
    weighed = [stage for array in gathered for stage in json.loads(np.asarray(array).tobytes())]
    return join_fingerprints(weighed, architecture)


def _facts(config: Config, data: str, model: str) -> dict[str, str]:
    """What must stay the same when a run is resumed.

    Args:
        config: of the run.
        data: hash of the training rows.
        model: fingerprint of the model before it was trained.
    """
    facts = {
        "data": data,
        "model": model,
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
    return facts


def sync_fact(config: Config) -> str:
    """How workers agree, as far as what is under way between them depends on it."""
    if config.parallel.sync == "delayed":
        return "delayed"
    diloco = config.parallel.diloco
    return f"diloco with {diloco.fragments} fragments every {diloco.sync_every}, {diloco.overlap_steps} late"
