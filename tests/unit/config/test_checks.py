"""Each rule: a configuration that breaks it, the key that is blamed, and the words that help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.config import Config, LoraConfig, ModelConfig, SourceConfig, TrainConfig
from mlx_distributed.config.checks import check, is_address, listed
from mlx_distributed.config.schema import DilocoConfig, PipelineConfig

SCRATCH = {"model_type": "qwen3", "vocab_size": 512}
GOOD = replace(
    Config(),
    model=ModelConfig(path="org/model"),
    data=replace(Config().data, train=(SourceConfig(path="org/rows"),)),
)
STREAMING = {"data__streaming": True, "train__max_steps": 9}
ELASTIC = {"elastic__enabled": True}


def changed(config: Config, **changes: Any) -> Config:
    """`config` with `section__key=value` replaced; `method` and `seed` have no section."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value}) if name else value})
    return config


def pipeline(num_stages: int, **changes: Any) -> dict[str, Any]:
    """A run on one copy of a model that is cut into stages."""
    settings = PipelineConfig(num_stages=num_stages, **changes)
    return {"parallel__pipeline": settings, "parallel__nproc": num_stages}


def machines(num_workers: int | None, **changes: Any) -> dict[str, Any]:
    """A run with workers on other machines too."""
    settings: dict[str, Any] = {"nproc": 1, "listen": "10.0.0.7:4000", "num_workers": num_workers} | changes
    return {f"parallel__{key}": value for key, value in settings.items()}


def diloco(**changes: Any) -> dict[str, Any]:
    """Changes by which workers train by themselves, with these settings."""
    return {"parallel__sync": "diloco", "parallel__diloco": DilocoConfig(**changes)}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"model__path": None}, "model.path", "model.path to a folder or a Hugging Face name, or model.scratch"),
        ({"model__path": ""}, "model.path", "no model is given"),
        ({"model__scratch": SCRATCH, "method": "full"}, "model.scratch", "beside model.path; remove one of the two"),
        ({"model__path": None, "model__scratch": SCRATCH}, "method", "set method: full"),
        (
            {"model__path": None, "model__scratch": SCRATCH, "method": "full", "model__revision": "main"},
            "model.revision",
            "remove it or set model.path",
        ),
        (
            {"model__path": None, "model__scratch": {"vocab_size": 9}, "method": "full"},
            "model.scratch.model_type",
            "such as qwen3",
        ),
        (
            {"model__path": None, "model__scratch": {"model_type": "qwen3"}, "method": "full"},
            "model.scratch.vocab_size",
            "such as 512",
        ),
        (
            {"model__path": None, "model__scratch": SCRATCH | {"vocab_size": True}, "method": "full"},
            "model.scratch.vocab_size",
            "whole number above 0",
        ),
        (
            {"model__path": None, "model__scratch": SCRATCH | {"rope": {"theta": float("inf")}}, "method": "full"},
            "model.scratch.rope.theta",
            "finite",
        ),
        ({"lora__alpha": 16.0, "lora__scale": 2.0}, "lora.scale", "lora.alpha=16, since scale is alpha / rank; remove"),
        ({"lora__alpha": 0.0}, "lora.alpha", "above 0; leave it out"),
        ({"lora__scale": -1.0}, "lora.scale", "above 0"),
        ({"lora__rank": 0}, "lora.rank", "at least 1; the default is 8"),
        ({"lora__dropout": 1.0}, "lora.dropout", "at least 0 and below 1; the default is 0.0"),
        ({"lora__num_layers": 0}, "lora.num_layers", "-1 (all layers) or at least 1"),
        ({"lora__target_modules": ()}, "lora.target_modules", "names such as q_proj, or all-linear"),
        ({"data__train": ()}, "data.train", "set it to a file, a folder or a dataset name"),
        ({"data__train": (SourceConfig(),)}, "data.train.0.path", "is missing; set it to a file"),
        ({"data__train": (SourceConfig(path="a", weight=0.0),)}, "data.train.0.weight", "above 0; to leave"),
        ({"data__validation": (SourceConfig(path="a", weight=2.0),)}, "data.validation.0.weight", "used once"),
        ({"data__train": (SourceConfig(path="a", weight=float("nan")),)}, "data.train.0.weight", "finite"),
        (
            {"data__validation": (SourceConfig(path="a", roles={"bot": "gpt"}),)},
            "data.validation.0.roles.bot",
            "use system, user, assistant, tool or function_call",
        ),
        ({"data__shuffle_buffer": 9}, "data.shuffle_buffer", "only means something with data.streaming=true"),
        ({"data__cache_dir": Path("a")}, "data.cache_dir", "only means something with data.streaming=true"),
        ({"data__streaming": True}, "train.max_steps", "must be set with data.streaming"),
        (STREAMING | {"data__val_fraction": 0.1}, "data.val_fraction", "rows of their own in data.validation"),
        (STREAMING | {"data__shuffle_buffer": 7}, "data.shuffle_buffer", "a step, train.global_batch_size=8, at least"),
        (
            STREAMING | {"data__train": (SourceConfig(path="a", weight=1e-5), SourceConfig(path="b"))},
            "data.train.0.weight",
            "too small a share for data.shuffle_buffer=10000",
        ),
        ({"data__val_fraction": 1.0}, "data.val_fraction", "at least 0 and below 1"),
        (
            {"data__val_fraction": 0.1, "data__validation": (SourceConfig(path="a"),)},
            "data.val_fraction",
            "beside data.validation; remove one",
        ),
        ({"data__max_seq_length": 1}, "data.max_seq_length", "at least 2"),
        ({"data__max_invalid_fraction": 1.1}, "data.max_invalid_fraction", "from 0 to 1; the default is 0.1"),
        (
            {"train__micro_batch_size": 3},
            "train.micro_batch_size",
            "divide train.global_batch_size=8; use 1, 2, 4 or 8",
        ),
        ({"train__micro_batch_size": 0}, "train.micro_batch_size", "at least 1"),
        ({"train__micro_batch_tokens": 0}, "train.micro_batch_tokens", "at least 1; leave it out if it is not wanted"),
        (
            {"train__micro_batch_tokens": 1023, "data__max_seq_length": 1020},
            "train.micro_batch_tokens",
            "a row of data.max_seq_length=1020 tokens would not fit; use 1024 or more, or shorter rows",
        ),
        ({"train__global_batch_size": 0}, "train.global_batch_size", "at least 1"),
        ({"train__epochs": 0.0}, "train.epochs", "above 0; the default is 1.0"),
        ({"train__max_steps": 0}, "train.max_steps", "at least 1"),
        ({"train__max_grad_norm": 0.0}, "train.max_grad_norm", "above 0"),
        ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate", "above 0; the default is 0.0001"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate", "finite"),
        ({"optimizer__betas": (0.9, 1.0)}, "optimizer.betas.1", "at least 0 and below 1"),
        ({"optimizer__eps": 0.0}, "optimizer.eps", "above 0"),
        ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay", "at least 0"),
        (
            {"scheduler__warmup_steps": 5, "scheduler__warmup_ratio": 0.1},
            "scheduler.warmup_ratio",
            "scheduler.warmup_steps=5; remove one",
        ),
        ({"scheduler__warmup_steps": -1}, "scheduler.warmup_steps", "at least 0"),
        ({"scheduler__warmup_ratio": 1.0}, "scheduler.warmup_ratio", "below 1"),
        ({"scheduler__min_lr_ratio": 2.0}, "scheduler.min_lr_ratio", "from 0 to 1"),
        ({"parallel__nproc": 0}, "parallel.nproc", "no worker would run; use 1"),
        (
            {"parallel__nproc": 3},
            "parallel.nproc",
            "only 2 micro-batches (train.global_batch_size=8 / train.micro_batch_size=4), so a worker would have "
            "nothing to do; use 2 or less, or train.micro_batch_size=2 or less",
        ),
        ({"parallel__nproc": 9}, "parallel.nproc", "use 2 or less, or train.global_batch_size=36 or more"),
        ({"parallel__share": (1.0, 2.0)}, "parallel.share", "2 weights for parallel.nproc=1; give 1, or even"),
        ({"parallel__nproc": 2, "parallel__share": (-1.0, 2.0)}, "parallel.share", "must be above 0"),
        ({"parallel__nproc": 2, "parallel__share": (0.0, 3.0)}, "parallel.share", "start fewer workers"),
        ({"parallel__nproc": 2, "parallel__share": (1.0, float("inf"))}, "parallel.share.1", "finite"),
        ({"parallel__nproc": 2, "parallel__backend": "native"}, "parallel.nproc", "use mlx.launch -n, or"),
        (
            {"optimizer__shard": True, "parallel__backend": "native"},
            "optimizer.shard",
            "needs parallel.backend=grpc: a native group only sums whole arrays; use that backend, or false",
        ),
        (
            {"parallel__sync": "delayed", "parallel__backend": "native"},
            "parallel.sync",
            "delayed needs parallel.backend=grpc, whose sums travel by themselves; use that, or step",
        ),
        ({"parallel__sync": "diloco", "parallel__backend": "native"}, "parallel.sync", "diloco needs parallel.backend"),
        (
            {"parallel__sync": "delayed", "optimizer__shard": True},
            "optimizer.shard",
            "cannot stand beside parallel.sync=delayed, with which every worker needs all moments; use false, or step",
        ),
        ({"parallel__sync": "diloco", "optimizer__shard": True}, "optimizer.shard", "beside parallel.sync=diloco"),
        (
            {"parallel__delay_compensation": 0.5},
            "parallel.delay_compensation",
            "only means something with parallel.sync=delayed; remove it, or set that",
        ),
        (
            {"parallel__delay_compensation": 0.5, "parallel__sync": "diloco"},
            "parallel.delay_compensation",
            "only means something with parallel.sync=delayed",
        ),
        (
            {"parallel__delay_compensation": -0.5, "parallel__sync": "delayed"},
            "parallel.delay_compensation",
            "at least 0; the default is 0.0",
        ),
        ({"parallel__delay_compensation": float("nan")}, "parallel.delay_compensation", "finite"),
        (
            diloco(sync_every=3, fragments=4, overlap_steps=0),
            "parallel.diloco.fragments",
            "only one leaves after a step, and there are parallel.diloco.sync_every=3; use 3 or fewer",
        ),
        (
            diloco(sync_every=32, fragments=4, overlap_steps=8),
            "parallel.diloco.overlap_steps",
            "a sum must have come before the next fragment leaves, 8 steps later; use 7 or fewer",
        ),
        (
            diloco(sync_every=7, fragments=4, overlap_steps=1),
            "parallel.diloco.overlap_steps",
            "must have come before the next fragment leaves, 1 steps later; use 0",
        ),
        (diloco(sync_every=0), "parallel.diloco.sync_every", "at least 1; the default is"),
        (diloco(fragments=0), "parallel.diloco.fragments", "at least 1; the default is"),
        (diloco(overlap_steps=-1), "parallel.diloco.overlap_steps", "at least 0; the default is"),
        (diloco(outer_learning_rate=0.0), "parallel.diloco.outer_learning_rate", "above 0; the default is"),
        (diloco(outer_learning_rate=float("inf")), "parallel.diloco.outer_learning_rate", "finite"),
        (diloco(outer_momentum=1.0), "parallel.diloco.outer_momentum", "at least 0 and below 1; the default is"),
        (diloco(outer_momentum=-0.1), "parallel.diloco.outer_momentum", "at least 0 and below 1"),
        ({"elastic__min_workers": 0}, "elastic.min_workers", "at least 1; the default is 1"),
        ({"elastic__wait_s": 0.0}, "elastic.wait_s", "above 0; the default is 600.0"),
        ({"elastic__coordinator_grace_s": -1.0}, "elastic.coordinator_grace_s", "above 0; the default is 600.0"),
        ({"parallel__share": "speed"}, "parallel.share", "use even, or set elastic.enabled=true"),
        ({"elastic__listen": "10.0.0.7:4000"}, "elastic.listen", "elastic.enabled=true; set that, or remove it"),
        (ELASTIC | {"elastic__listen": "10.0.0.7"}, "elastic.listen", "such as 192.168.1.20:4000"),
        (
            ELASTIC | {"parallel__backend": "native"},
            "parallel.backend",
            "a native group cannot lose a member; use grpc",
        ),
        (ELASTIC | {"parallel__sync": "delayed"}, "parallel.sync", "beside elastic.enabled=true: a sum under way"),
        (pipeline(2, in_flight=1), "parallel.pipeline.in_flight", "at least 2, or the last worker waits"),
        (pipeline(2, chunks=2), "parallel.pipeline.chunks", "schedule=interleaved; set that, or use 1"),
        (pipeline(2, schedule="interleaved"), "parallel.pipeline.schedule", "chunks to 2 or more, or use 1f1b"),
        (pipeline(2, split=(1, 2, 3)), "parallel.pipeline.split", "each of the 2 stages"),
        (pipeline(2) | {"parallel__nproc": 3}, "parallel.nproc", "of the model; use --nproc 4"),
        (pipeline(2) | {"parallel__share": (1.0, 1.0)}, "parallel.share", "for parallel.nproc=2; give 1, or even"),
        (pipeline(2) | {"parallel__bandwidth": (1.0, 1.0)}, "parallel.bandwidth", "slices of their own; use even"),
        (pipeline(2) | {"parallel__wire": "int8"}, "parallel.wire", "what rounding leaves out would"),
        (pipeline(2) | {"optimizer__shard": True}, "optimizer.shard", "its part of the moments anyway; use false"),
        (pipeline(2) | {"parallel__sync": "delayed"}, "parallel.sync", "agree in every step; use step"),
        (pipeline(2) | ELASTIC, "elastic.enabled", "takes its layers with it; use false"),
        (ELASTIC | diloco(overlap_steps=1), "parallel.diloco.overlap_steps", "is of one group; use 0"),
        (ELASTIC | {"parallel__bandwidth": (1.0,)}, "parallel.bandwidth", "weights fit nobody; use even"),
        (ELASTIC | {"parallel__share": (1.0,)}, "parallel.share", "weights fit nobody; use even or speed"),
        (machines(1, nproc=2), "parallel.num_workers", "on all machines, and parallel.nproc=2 are on this one"),
        (machines(2, listen=None), "parallel.num_workers", "leaves 1 for other machines: set parallel.listen to"),
        (machines(2, listen="10.0.0.7"), "parallel.listen", "such as 192.168.1.20:4000"),
        (machines(None), "parallel.listen", "needs parallel.num_workers, to know how many are to come"),
        (machines(2) | ELASTIC, "parallel.num_workers", "workers come and go; leave it out"),
        (machines(2, backend="native"), "parallel.num_workers", "cannot stand beside parallel.backend=native"),
        (machines(0), "parallel.num_workers", "at least 1; leave it out"),
        (machines(3, pipeline=PipelineConfig(num_stages=2)), "parallel.num_workers", "of the model; use 4"),
        (machines(9), "parallel.num_workers", "a step has only 2 micro-batches"),
        (machines(2, share=(1.0,)), "parallel.share", "has 1 weights for parallel.num_workers=2; give 2, or even"),
        (pipeline(2, speeds=(1.0,)), "parallel.pipeline.speeds", "for parallel.nproc=2; give 2, or auto"),
        (pipeline(2, speeds=(1.0, 0.0)), "parallel.pipeline.speeds", "weights must be above 0"),
        (pipeline(2, schedule="auto", chunks=2), "parallel.pipeline.chunks", "schedule=interleaved; set that"),
        ({"parallel__timeout_s": 0.0}, "parallel.timeout_s", "above 0; the default is 300.0"),
        ({"parallel__port": 80}, "parallel.port", "0 (free ports are taken) or from 1024 to 65534"),
        ({"parallel__port": 65534, "parallel__nproc": 2}, "parallel.port", "to 65533"),
        ({"eval__steps": 0}, "eval.steps", "at least 1; leave it out"),
        ({"eval__max_examples": 0}, "eval.max_examples", "at least 1"),
        ({"eval__max_new_tokens": 0}, "eval.max_new_tokens", "at least 1"),
        ({"eval__num_samples": -1}, "eval.num_samples", "at least 0"),
        ({"eval__generate": True}, "eval.generate", "set data.validation or data.val_fraction"),
        ({"checkpoint__steps": 0}, "checkpoint.steps", "at least 1; the default is 100"),
        ({"checkpoint__save_total_limit": 0}, "checkpoint.save_total_limit", "at least 1"),
        ({"logging__steps": 0}, "logging.steps", "at least 1"),
        ({"wandb__log_checkpoints": True}, "wandb.log_checkpoints", "needs wandb.project"),
        ({"wandb__log_final": True}, "wandb.log_final", "needs wandb.project"),
        ({"wandb__system_metrics": True}, "wandb.system_metrics", "needs wandb.project"),
        ({"seed": -1}, "seed", "from 0 to 4294967295"),
    ],
)
def test_broken_rule(changes: dict[str, Any], key: str, words: str) -> None:
    [problem] = check(changed(GOOD, **changes))
    assert problem.key == key
    assert words in problem.message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__path": None, "model__scratch": SCRATCH, "method": "full"},
        {"method": "full", "lora__dropout": 0.5},
        {"model__revision": "main", "lora__scale": 2.0, "lora__num_layers": 4},
        {"data__val_fraction": 0.1, "eval__generate": True, "eval__num_samples": 0},
        {"data__validation": (SourceConfig(path="a", roles={"no": "user"}),), "eval__generate": True},
        {"data__max_invalid_fraction": 1.0, "data__max_seq_length": 2},
        {"train__max_grad_norm": None, "optimizer__betas": (0.0, 0.0), "optimizer__weight_decay": 0.0},
        {"parallel__nproc": 2, "parallel__share": (1.0, 3.0), "parallel__port": 65533},
        {"parallel__backend": "native", "parallel__port": 1024},
        {"parallel__nproc": 2, "optimizer__shard": True, "parallel__wire": "int8"},
        ELASTIC | {"parallel__share": "speed", "parallel__nproc": 2, "elastic__min_workers": 3},
        ELASTIC | {"elastic__listen": "studio.local:0", "parallel__wire": "bf16"},
        {"parallel__sync": "delayed", "parallel__wire": "int8"},
        {"parallel__sync": "delayed", "parallel__delay_compensation": 0.5, "parallel__nproc": 2},
        {"parallel__nproc": 2, "parallel__share": (1.0, 3.0), "parallel__wire": "int4"} | diloco(),
        diloco(sync_every=32, fragments=4, overlap_steps=7),
        diloco(sync_every=4, fragments=4, overlap_steps=0, outer_learning_rate=1.0, outer_momentum=0.0),
        diloco(sync_every=1, fragments=1, overlap_steps=0),
        diloco(sync_every=9, fragments=2, overlap_steps=3),
        {"parallel__backend": "native", "parallel__diloco": DilocoConfig(sync_every=2, fragments=4)},  # not in use
        {"checkpoint__steps": None, "checkpoint__save_total_limit": None, "checkpoint__keep_best": True},
        {"wandb__project": "p", "wandb__log_checkpoints": True, "scheduler__warmup_ratio": 0.0},
        {"train__micro_batch_tokens": 2048, "train__global_batch_size": 7, "parallel__nproc": 3},
    ],
)
def test_kept_rules(changes: dict[str, Any]) -> None:
    assert check(changed(GOOD, **changes)) == []


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("10.0.0.7:4000", True),
        ("studio.local:0", True),
        ("[fd00::7]:65535", True),
        ("fd00::7:4000", False),
        ("[]:4000", False),
        (":4000", False),
        ("0.0.0.0:4000", False),
        ("[::]:4000", False),
        ("host", False),
        ("host:", False),
        ("host:65536", False),
        ("host:\u0664", False),
        ("host:-1", False),
        ("tcp://host:1", False),
        ("a b:1", False),
    ],
)
def test_an_address_is_one_that_others_reach(text: str, fits: bool) -> None:
    assert is_address(text) == fits


def test_rule_about_two_values_waits_for_the_rules_about_each() -> None:
    [problem] = check(changed(GOOD, lora__alpha=0.0, lora__scale=1.0))
    assert problem.key == "lora.alpha"


@given(st.integers(1, 99), st.integers(1, 99), st.integers(0, 99))
def test_named_settings_of_diloco_work(sync_every: int, fragments: int, overlap_steps: int) -> None:
    settings = {"sync_every": sync_every, "fragments": fragments, "overlap_steps": overlap_steps}
    for _ in range(2):  # who has fewer fragments may still have too long an overlap
        for problem in check(changed(GOOD, **diloco(**settings))):
            name = problem.key.removeprefix("parallel.diloco.")
            settings[name] = int(problem.message.rpartition("; use ")[2].split()[0])
    assert check(changed(GOOD, **diloco(**settings))) == []
    assert settings["sync_every"] == sync_every


@given(st.integers(1, 10**15), st.integers(1, 10**15), st.integers(1, 20))
def test_named_batch_sizes_work(global_batch_size: int, micro_batch_size: int, nproc: int) -> None:
    config = changed(
        GOOD,
        train__global_batch_size=global_batch_size,
        train__micro_batch_size=micro_batch_size,
        parallel__nproc=nproc,
    )
    for problem in check(config):
        words = problem.message.rpartition("; use ")[2].replace(",", "").split()
        if problem.key == "train.micro_batch_size":
            remedies = [{"train__micro_batch_size": int(word)} for word in words if word.isdecimal()]
        else:
            section, _, value = next(word for word in words if "=" in word).partition("=")
            remedies = [{section.replace(".", "__"): int(value), "parallel__nproc": nproc}]
        for remedy in remedies:
            left = {found.key for found in check(changed(config, **remedy))}
            assert problem.key not in left


@pytest.mark.parametrize(
    ("lora", "scale"),
    [(LoraConfig(), 2.0), (LoraConfig(rank=4, alpha=2.0), 0.5), (LoraConfig(rank=4, scale=20.0), 20.0)],
)
def test_effective_scale(lora: LoraConfig, scale: float) -> None:
    assert lora.effective_scale == scale


def test_num_microbatches() -> None:
    assert TrainConfig(global_batch_size=12, micro_batch_size=4).num_microbatches == 3


def test_listed() -> None:
    assert [listed((1,)), listed((1, 2)), listed([1, 2, 3])] == ["1", "1 or 2", "1, 2 or 3"]
