"""The rules that a configuration must keep: ranges of single values, and values that must fit each other.

Pure: nothing is read and nothing is raised, so that the caller can attach the place where a value was written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import Any

from mlx_distributed.config.eval_checks import check_eval
from mlx_distributed.config.precision_checks import check_precision
from mlx_distributed.config.problem import Problem
from mlx_distributed.config.quantities import parse_bytes
from mlx_distributed.config.schema import (
    LENGTH_MULTIPLE,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
)
from mlx_distributed.config.stream_checks import check_stream

OUR_ROLES = ("system", "user", "assistant", "tool", "function_call")

_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        "lora.rank train.global_batch_size train.micro_batch_size train.micro_batch_tokens train.max_steps eval.steps "
        "eval.max_examples eval.max_new_tokens eval.patience checkpoint.steps checkpoint.save_total_limit "
        "logging.steps parallel.diloco.sync_every parallel.diloco.fragments parallel.pipeline.num_stages "
        "parallel.pipeline.chunks parallel.num_workers elastic.min_workers",
    ),
    ("at least 2, a token and the one after it", lambda value: value >= 2, "data.max_seq_length"),
    (
        "at least 0",
        lambda value: value >= 0,
        "optimizer.weight_decay scheduler.warmup_steps eval.num_samples eval.min_delta parallel.delay_compensation "
        "parallel.diloco.overlap_steps",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "lora.alpha lora.scale train.epochs train.max_grad_norm train.neftune_noise_alpha optimizer.learning_rate "
        "optimizer.eps parallel.timeout_s parallel.diloco.outer_learning_rate elastic.wait_s "
        "elastic.coordinator_grace_s",
    ),
    (
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "lora.dropout data.val_fraction scheduler.warmup_ratio parallel.diloco.outer_momentum",
    ),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "data.max_invalid_fraction scheduler.min_lr_ratio"),
    ("2, 3, 4, 6 or 8", lambda value: value in (2, 3, 4, 6, 8), "model.quantize.bits"),
    ("32, 64 or 128", lambda value: value in (32, 64, 128), "model.quantize.group_size"),
    ("-1 (all layers) or at least 1", lambda value: value == -1 or value >= 1, "lora.num_layers"),
    # numpy, MLX and the tokenizers all take 32 bits.
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, "seed"),
)


def check(config: Config) -> list[Problem]:
    """Every rule that `config` breaks, in no special order; empty when it can be used.

    A rule about several values is left out while one of them breaks a rule of its own.
    """
    alone = [*_not_finite(config, ""), *_out_of_range(config)]
    # A number that is not finite breaks most ranges too: one message is enough.
    alone = list({problem.key: problem for problem in reversed(alone)}.values())
    bad = {problem.key for problem in alone}
    together = [*_model(config), *_data(config.data), *_step(config), *_parallel(config.parallel)]
    together += [*_sync(config), *_pipeline(config), *_elastic(config), *_pairs(config)]
    return alone + [problem for problem in together if bad.isdisjoint((problem.key, *problem.others))]


def _not_finite(value: object, key: str) -> Iterator[Problem]:
    if isinstance(value, float):
        if not math.isfinite(value):
            yield Problem(key, "must be a finite number; nan and infinity cannot be used")
        return
    children: list[tuple[object, object]] = []
    if is_dataclass(value):
        children = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, tuple | list):
        children = list(enumerate(value))
    for name, child in children:
        yield from _not_finite(child, f"{key}.{name}" if key else str(name))


def _out_of_range(config: Config) -> Iterator[Problem]:
    for rule, holds, keys in _RULES:
        for key in keys.split():
            value = _get(config, key)
            if value is not None and not holds(value):
                default = _get(Config(), key)
                works = "leave it out if it is not wanted" if default is None else f"the default is {default}"
                yield Problem(key, f"must be {rule}; {works}")
    for index, beta in enumerate(config.optimizer.betas):
        if not 0 <= beta < 1:
            yield Problem(f"optimizer.betas.{index}", "must be at least 0 and below 1; the default is [0.9, 0.999]")
    if config.parallel.nproc < 1:
        yield Problem("parallel.nproc", "no worker would run; use 1 for a single one, or more")


def _get(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _model(config: Config) -> Iterator[Problem]:
    model: ModelConfig = config.model
    both = ("model.path", "model.scratch")
    if not model.path and model.scratch is None:
        yield Problem(
            "model.path",
            "no model is given; set model.path to a folder or a Hugging Face name, or model.scratch to an architecture",
            both,
        )
    if model.path and model.scratch is not None:
        yield Problem("model.scratch", "cannot stand beside model.path; remove one of the two", both)
    if model.revision is not None and not model.path:
        yield Problem("model.revision", "only means something for model.path; remove it or set model.path", both)
    if model.scratch is None:
        return
    if config.method != "full":
        rule = "a model from scratch has no stored base that an adapter could be loaded onto; set method: full"
        yield Problem("method", rule, ("model.scratch",))
    model_type, vocab_size = model.scratch.get("model_type"), model.scratch.get("vocab_size")
    if not isinstance(model_type, str) or not model_type:
        yield Problem("model.scratch.model_type", "must name an architecture of mlx-lm, such as qwen3")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        yield Problem("model.scratch.vocab_size", "must be a whole number above 0, such as 512: the tokens to train")


def _data(data: DataConfig) -> Iterator[Problem]:
    if not data.train:
        yield Problem("data.train", "no training data are given; set it to a file, a folder or a dataset name")
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for index, source in enumerate(sources):
            key = f"data.{split}.{index}"
            if not source.path:
                yield Problem(f"{key}.path", "is missing; set it to a file, a folder or a dataset name")
            if split == "validation" and source.weight != 1.0:
                yield Problem(f"{key}.weight", "means nothing here: each validation row is used once; remove it")
            elif not source.weight > 0:
                yield Problem(f"{key}.weight", "must be above 0; to leave the source out, remove it")
            for theirs, ours in source.roles.items():
                if ours not in OUR_ROLES:
                    yield Problem(f"{key}.roles.{theirs}", f"is not a role of ours; use {listed(OUR_ROLES)}")
    if data.val_fraction and data.validation:
        yield Problem(
            "data.val_fraction",
            "cannot stand beside data.validation; remove one of the two",
            ("data.validation",),
        )


def _step(config: Config) -> Iterator[Problem]:
    if config.train.memory_budget is not None and parse_bytes(config.train.memory_budget) is None:
        rule = "must be above 0 and written as in 12GB or 8GiB; leave it out to set no limit"
        yield Problem("train.memory_budget", rule)
    # The workers of one copy of the model compute the same micro-batches.
    train, nproc = config.train, config.parallel.size // max(config.parallel.pipeline.num_stages, 1)
    if train.micro_batch_size < 1 or train.global_batch_size < 1:
        return
    if train.micro_batch_tokens is not None:
        yield from _token_budget(config, train.micro_batch_tokens)
        return
    # Larger micro-batches than these are nobody's; the bound keeps a mistyped number from being factored for hours.
    divisors = [size for size in range(1, min(train.global_batch_size, 4096) + 1) if not train.global_batch_size % size]
    if train.global_batch_size % train.micro_batch_size:
        near = sorted(sorted(divisors, key=lambda size: abs(size - train.micro_batch_size))[:8])
        yield Problem(
            "train.micro_batch_size",
            f"must divide train.global_batch_size={train.global_batch_size}; use {listed(near)}",
            ("train.global_batch_size",),
        )
    elif nproc > train.num_microbatches:
        fitting = [size for size in divisors if train.global_batch_size // size >= nproc]
        due = nproc * train.micro_batch_size
        works = f"train.micro_batch_size={fitting[-1]} or less" if fitting else f"train.global_batch_size={due} or more"
        yield Problem(
            workers_key(config.parallel),
            f"a step has only {train.num_microbatches} micro-batches (train.global_batch_size="
            f"{train.global_batch_size} / train.micro_batch_size={train.micro_batch_size}), so a worker would have "
            f"nothing to do; use {train.num_microbatches} or less, or {works}",
            ("train.micro_batch_size", "train.global_batch_size"),
        )


def _token_budget(config: Config, limit: int) -> Iterator[Problem]:
    longest = config.data.max_seq_length
    due = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    if limit < due:
        rule = f"a row of data.max_seq_length={longest} tokens would not fit; use {due} or more, or shorter rows"
        yield Problem("train.micro_batch_tokens", rule, ("data.max_seq_length",))


def workers_key(parallel: ParallelConfig) -> str:
    """The key that says how many workers there are."""
    return "parallel.nproc" if parallel.num_workers is None else "parallel.num_workers"


def _parallel(parallel: ParallelConfig) -> Iterator[Problem]:
    nproc, num_stages, count = parallel.nproc, max(parallel.pipeline.num_stages, 1), workers_key(parallel)
    for key, weights, due, default in (
        ("parallel.share", parallel.share, parallel.size // num_stages, "even"),
        ("parallel.bandwidth", parallel.bandwidth, parallel.size, "even"),
        ("parallel.pipeline.speeds", parallel.pipeline.speeds, parallel.size, "auto"),
    ):
        if isinstance(weights, tuple):
            if len(weights) != due:
                rule = f"has {len(weights)} weights for {count}={parallel.size}; give {due}, or {default}"
                yield Problem(key, rule, (count,))
            elif min(weights) <= 0:
                yield Problem(key, "weights must be above 0; give such weights, or start fewer workers")
    if parallel.backend == "native" and nproc > 1:
        yield Problem(
            "parallel.nproc",
            "must be 1 with parallel.backend=native, where mlx.launch starts the workers; "
            "use mlx.launch -n, or parallel.backend=grpc",
            ("parallel.backend",),
        )
    if parallel.backend == "native" and parallel.wire != "fp32":
        rule = "needs parallel.backend=grpc: a native group sends values as they are; use fp32, or that backend"
        yield Problem("parallel.wire", rule, ("parallel.backend",))
    if parallel.port and not 1024 <= parallel.port <= 65535 - nproc:
        rule = f"must be 0 (free ports are taken) or from 1024 to {65535 - nproc}, since each worker takes one"
        yield Problem("parallel.port", f"{rule}; 0 is the default", ("parallel.nproc",))
    yield from _machines(parallel)


def _machines(parallel: ParallelConfig) -> Iterator[Problem]:
    """Of workers on several machines that are all there from the beginning to the end."""
    listen, num_workers, all_of_them = "parallel.listen", parallel.num_workers, ("parallel.num_workers",)
    if parallel.listen is not None and not is_address(parallel.listen):
        rule = "must be a host and a port that other machines reach, such as 192.168.1.20:4000 or studio.local:4000"
        yield Problem(listen, f"{rule}; leave it out to train on this machine alone")
    elif parallel.listen is not None and num_workers is None:
        rule = "needs parallel.num_workers, to know how many are to come; set that (where workers may come and go, use"
        yield Problem(listen, f"{rule} elastic.listen), or remove it", all_of_them)
    if num_workers is None:
        return
    if num_workers < parallel.nproc:
        rule = f"is on all machines, and parallel.nproc={parallel.nproc} are on this one; use {parallel.nproc} or more"
        yield Problem("parallel.num_workers", rule, ("parallel.nproc",))
    elif num_workers > parallel.nproc and parallel.listen is None:
        num_others = num_workers - parallel.nproc
        rule = f"leaves {num_others} for other machines: set parallel.listen to an address of this one that they reach,"
        use = f"such as 192.168.1.20:4000, or --nproc {num_workers}"
        yield Problem("parallel.num_workers", f"{rule} {use}", (listen, "parallel.nproc"))
    if parallel.backend == "native":
        rule = "cannot stand beside parallel.backend=native, where mlx.launch starts the workers; remove one of the two"
        yield Problem("parallel.num_workers", rule, ("parallel.backend",))


def _sync(config: Config) -> Iterator[Problem]:
    parallel, diloco = config.parallel, config.parallel.diloco
    if parallel.sync != "step":
        sync = f"parallel.sync={parallel.sync}"
        if parallel.backend == "native":
            rule = f"{parallel.sync} needs parallel.backend=grpc, whose sums travel by themselves; use that, or step"
            yield Problem("parallel.sync", rule, ("parallel.backend",))
        if config.optimizer.shard:
            rule = f"cannot stand beside {sync}, with which every worker needs all moments; use false, or step"
            yield Problem("optimizer.shard", rule, ("parallel.sync",))
    if parallel.delay_compensation and parallel.sync != "delayed":
        rule = "only means something with parallel.sync=delayed; remove it, or set that"
        yield Problem("parallel.delay_compensation", rule, ("parallel.sync",))
    if parallel.sync == "diloco" and min(diloco.sync_every, diloco.fragments) >= 1:
        every = ("parallel.diloco.sync_every",)
        if diloco.fragments > diloco.sync_every:
            rule = f"only one leaves after a step, and there are parallel.diloco.sync_every={diloco.sync_every}"
            yield Problem("parallel.diloco.fragments", f"{rule}; use {diloco.sync_every} or fewer", every)
        elif diloco.overlap_steps >= (between := diloco.sync_every // diloco.fragments):
            rule = f"a sum must have come before the next fragment leaves, {between} steps later; use {between - 1}"
            keys = ("parallel.diloco.fragments", *every)
            yield Problem("parallel.diloco.overlap_steps", f"{rule}{' or fewer' if between > 1 else ''}", keys)


def _pipeline(config: Config) -> Iterator[Problem]:
    parallel, pipeline, stages = config.parallel, config.parallel.pipeline, ("parallel.pipeline.num_stages",)
    if pipeline.chunks > 1 and pipeline.schedule != "interleaved":
        rule = "only means something with parallel.pipeline.schedule=interleaved; set that, or use 1"
        yield Problem("parallel.pipeline.chunks", rule, ("parallel.pipeline.schedule",))
    if pipeline.schedule == "interleaved" and pipeline.chunks < 2:
        rule = "gives every worker several stages: set parallel.pipeline.chunks to 2 or more, or use 1f1b"
        yield Problem("parallel.pipeline.schedule", rule, ("parallel.pipeline.chunks",))
    if not isinstance(pipeline.in_flight, str) and pipeline.in_flight < pipeline.num_stages:
        rule = f"must be at least {pipeline.num_stages}, or the last worker waits for the first; use that, or auto"
        yield Problem("parallel.pipeline.in_flight", rule, stages)
    if isinstance(pipeline.split, tuple) and len(pipeline.split) != pipeline.num_stages * pipeline.chunks:
        num = pipeline.num_stages * pipeline.chunks
        rule = f"must say for each of the {num} stages how many layers it has; it has {len(pipeline.split)} numbers"
        yield Problem("parallel.pipeline.split", f"{rule}; or use auto", stages)
    if pipeline.num_stages <= 1:
        return
    if parallel.size % pipeline.num_stages:
        rule = f"must be a multiple of parallel.pipeline.num_stages={pipeline.num_stages}, the workers of one copy"
        num = -(-parallel.size // pipeline.num_stages) * pipeline.num_stages
        use = f"--nproc {num}" if parallel.num_workers is None else f"{num}"
        yield Problem(workers_key(parallel), f"{rule} of the model; use {use}", stages)
    for key, fits, rule in (
        ("parallel.backend", parallel.backend == "grpc", "its groups are made over gRPC; use grpc"),
        ("parallel.sync", parallel.sync == "step", "its workers agree in every step; use step"),
        ("parallel.wire", parallel.wire == "fp32", "what rounding leaves out would belong to a stage; use fp32"),
        ("optimizer.shard", not config.optimizer.shard, "a stage has only its part of the moments anyway; use false"),
        ("parallel.bandwidth", isinstance(parallel.bandwidth, str), "its groups have slices of their own; use even"),
        ("elastic.enabled", not config.elastic.enabled, "a lost worker takes its layers with it; use false"),
    ):
        if not fits:
            of = f"parallel.pipeline.num_stages={pipeline.num_stages}"
            yield Problem(key, f"cannot stand beside {of}: {rule}", stages)


def _elastic(config: Config) -> Iterator[Problem]:
    elastic, parallel, enabled = config.elastic, config.parallel, ("elastic.enabled",)
    if parallel.share == "speed" and not elastic.enabled:
        rule = "only elastic training measures how fast workers are; use even, or set elastic.enabled=true"
        yield Problem("parallel.share", rule, enabled)
    if elastic.listen is not None:
        if not is_address(elastic.listen):
            rule = "must be a host and a port that other machines reach, such as 192.168.1.20:4000 or studio.local:4000"
            yield Problem("elastic.listen", f"{rule}; leave it out to serve this machine alone")
        elif not elastic.enabled:
            yield Problem(
                "elastic.listen", "only means something with elastic.enabled=true; set that, or remove it", enabled
            )
    if not elastic.enabled:
        return
    for key, fits, rule in (
        ("parallel.num_workers", parallel.num_workers is None, "workers come and go; leave it out"),
        ("parallel.backend", parallel.backend == "grpc", "a native group cannot lose a member; use grpc"),
        ("parallel.sync", parallel.sync != "delayed", "a sum under way is of one group; use step or diloco"),
        ("parallel.diloco.overlap_steps", not parallel.diloco.overlap_steps, "a sum under way is of one group; use 0"),
        (
            "parallel.bandwidth",
            isinstance(parallel.bandwidth, str),
            "workers come and go, so weights fit nobody; use even or auto",
        ),
        (
            "parallel.share",
            isinstance(parallel.share, str),
            "workers come and go, so weights fit nobody; use even or speed",
        ),
    ):
        if not fits:
            yield Problem(key, f"cannot stand beside elastic.enabled=true: {rule}", enabled)


def is_address(text: str) -> bool:
    """Whether `text` is a host that can be reached and a port, as in `10.0.0.7:4000` or `[fd00::7]:4000`."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    whole = bool(bare) and (":" not in host or bare != host) and not re.search(r"[\s/@,]", host)
    return whole and bare not in ("0.0.0.0", "::", "*") and port.isdecimal() and port.isascii() and int(port) <= 65535


def _pairs(config: Config) -> Iterator[Problem]:
    lora, scheduler = config.lora, config.scheduler
    if lora.alpha is not None and lora.scale is not None:
        rule = f"cannot stand beside lora.alpha={lora.alpha:g}, since scale is alpha / rank; remove one of the two"
        yield Problem("lora.scale", rule, ("lora.alpha",))
    if lora.target_modules == ():
        yield Problem("lora.target_modules", "names no module; give names such as q_proj, or all-linear")
    if scheduler.warmup_steps is not None and scheduler.warmup_ratio is not None:
        rule = f"cannot stand beside scheduler.warmup_steps={scheduler.warmup_steps}; remove one of the two"
        yield Problem("scheduler.warmup_ratio", rule, ("scheduler.warmup_steps",))
    if config.optimizer.shard and config.parallel.backend == "native":
        rule = "needs parallel.backend=grpc: a native group only sums whole arrays; use that backend, or false"
        yield Problem("optimizer.shard", rule, ("parallel.backend",))
    yield from check_eval(config)
    yield from check_stream(config)
    yield from check_precision(config)
    for key in ("log_checkpoints", "log_final", "system_metrics"):
        if getattr(config.wandb, key) and not config.wandb.project:
            rule = "needs wandb.project, without which Weights & Biases is off; set that, or leave this out"
            yield Problem(f"wandb.{key}", rule, ("wandb.project",))


def listed(items: tuple[object, ...] | list[Any]) -> str:
    """`1, 2 or 4`."""
    *head, last = map(str, items)
    return f"{', '.join(head)} or {last}" if head else last
