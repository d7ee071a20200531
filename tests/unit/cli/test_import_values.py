"""What keys of each program become: conversions, and features that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from import_samples import config, fate, of

from mlx_distributed.cli.import_config.render import to_text
from mlx_distributed.config import Config

METRICS = {"do_causal_lm_eval": True, "val_set_size": 0.1}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("name", "values", "key", "expected"),
    [
        ("axolotl", {}, "method", "full"),
        ("axolotl", {"adapter": "qlora"}, "method", "lora"),
        ("axolotl", {"adapter": "lora", "peft_use_dora": True}, "method", "dora"),
        ("axolotl", {"adapter": "lora", "lora_r": 16, "lora_alpha": 8, "peft_use_rslora": True}, "lora.scale", 2.0),
        ("axolotl", {"adapter": "lora", "lora_r": 16, "lora_alpha": 8}, "lora.alpha", 8.0),
        ("axolotl", {"adapter": "lora", "lora_target_modules": ["q_proj"]}, "lora.target_modules", ("q_proj",)),
        ("axolotl", {"adapter": "lora", "lora_target_linear": True}, "lora.target_modules", "all-linear"),
        ("axolotl", {"sequence_len": "4096"}, "data.max_seq_length", 4096),
        ("axolotl", {"learning_rate": "2e-5"}, "optimizer.learning_rate", 2e-5),
        ("axolotl", {"excess_length_strategy": "raise"}, "data.overlong", "error"),
        ("axolotl", {"train_on_inputs": True}, "data.train_on", "all"),
        ("axolotl", {"val_set_size": 0.05}, "data.val_fraction", 0.05),
        ("axolotl", {"warmup_steps": 0.1}, "scheduler.warmup_ratio", 0.1),
        ("axolotl", {"warmup_steps": 10, "warmup_ratio": 0.1}, "scheduler.warmup_steps", 10),
        ("axolotl", {"lr_scheduler": "constant", "warmup_ratio": 0.1}, "scheduler.warmup_steps", 0),
        ("axolotl", {}, "scheduler.warmup_ratio", 0.03),
        ("axolotl", {"cosine_min_lr_ratio": 0.2}, "scheduler.min_lr_ratio", 0.2),
        ("axolotl", {"adam_beta2": 0.95}, "optimizer.betas", (0.9, 0.95)),
        ("axolotl", {"save_strategy": "no", "save_steps": 20}, "checkpoint.steps", None),
        ("axolotl", {"save_steps": 0.25, "max_steps": 100}, "checkpoint.steps", 25),
        ("axolotl", {"saves_per_epoch": 0}, "checkpoint.steps", None),
        ("axolotl", {"sample_packing": True}, "data.packing", True),
        ("axolotl", {"streaming": True, "max_steps": 9}, "data.streaming", True),
        ("axolotl", {"streaming": True, "max_steps": 9, "dataset_prepared_path": "/p"}, "data.cache_dir", Path("/p")),
        ("axolotl", {"dataset_prepared_path": "p"}, "data.cache_dir", None),
        ("axolotl", METRICS | {"eval_causal_lm_metrics": ["chrf", "sacrebleu"]}, "eval.metrics", ("chrf", "bleu")),
        ("axolotl", METRICS, "eval.generate", True),
        ("axolotl", METRICS | {"eval_max_new_tokens": 9}, "eval.max_new_tokens", 9),
        ("axolotl", {"bf16": True}, "precision", "bf16"),
        ("axolotl", {"bf16": "auto"}, "precision", "bf16"),
        ("axolotl", {"bf16": "auto", "fp16": True}, "precision", "fp16"),
        ("axolotl", {"neftune_noise_alpha": 5}, "train.neftune_noise_alpha", 5.0),
        ("axolotl", {"adapter": "qlora", "load_in_4bit": True}, "model.quantize.bits", 4),
        ("axolotl", {"adapter": "lora", "load_in_8bit": True}, "model.quantize.bits", 8),
        ("llamafactory", {"quantization_bit": 4}, "model.quantize.bits", 4),
        ("llamafactory", {"pure_bf16": True}, "precision", "bf16"),
        ("axolotl", {"gradient_checkpointing": "offload"}, "train.gradient_checkpointing", True),
        ("axolotl", {"wandb_project": "p", "wandb_log_model": "checkpoint"}, "wandb.log_checkpoints", True),
        ("axolotl", {"wandb_project": "p", "wandb_log_model": "end"}, "wandb.log_final", True),
        ("axolotl", {"early_stopping_patience": 2, "eval_steps": 5, "val_set_size": 0.1}, "eval.patience", 2),
        ("llamafactory", {}, "lora.alpha", 16.0),
        ("llamafactory", {"lora_rank": 4, "use_rslora": True}, "lora.scale", 4.0),
        ("llamafactory", {"lora_rank": 4, "lora_alpha": 8, "use_rslora": True}, "lora.scale", 4.0),
        ("llamafactory", {"use_dora": True}, "method", "dora"),
        ("llamafactory", {"finetuning_type": "full"}, "method", "full"),
        ("llamafactory", {"lora_target": "q_proj, v_proj"}, "lora.target_modules", ("q_proj", "v_proj")),
        ("llamafactory", {"lora_target": "all"}, "lora.target_modules", "all-linear"),
        ("llamafactory", {"mask_history": True}, "data.train_on", "last"),
        ("llamafactory", {"train_on_prompt": True}, "data.train_on", "all"),
        ("llamafactory", {"packing": False, "neat_packing": True}, "data.packing", True),
        ("llamafactory", {"optim": "adamw_8bit", "run_name": "a"}, "wandb.name", "a"),
        ("llamafactory", {"disable_gradient_checkpointing": True}, "train.gradient_checkpointing", False),
        ("llamafactory", {}, "train.gradient_checkpointing", True),
        ("llamafactory", {}, "train.epochs", 3.0),
        ("llamafactory", {"streaming": True, "max_steps": 9, "buffer_size": 64}, "data.shuffle_buffer", 64),
        ("llamafactory", {"buffer_size": 64}, "data.shuffle_buffer", 10_000),
        ("llamafactory", {"max_steps": -1}, "train.max_steps", None),
        ("llamafactory", {"report_to": ["wandb", "tensorboard"]}, "wandb.project", "llamafactory"),
        ("llamafactory", {"max_grad_norm": 0}, "train.max_grad_norm", None),
        ("llamafactory", {"load_best_model_at_end": True, "val_size": 0.1}, "checkpoint.final", "best"),
        ("llamafactory-v1", {"peft_config": {"name": "lora", "r": 4, "target_modules": "all"}}, "lora.rank", 4),
        ("llamafactory-v1", {}, "method", "full"),
        ("llamafactory-v1", {"micro_batch_size": 2, "global_batch_size": 8}, "train.global_batch_size", 8),
        ("llamafactory-v1", {"optim_config": {"name": "adamw"}}, "optimizer.name", "adamw"),
        ("mlx-lm", {"iters": 100, "grad_accumulation_steps": 4}, "train.max_steps", 25),
        ("mlx-lm", {"batch_size": 2, "grad_accumulation_steps": 4}, "train.global_batch_size", 8),
        ("mlx-lm", {"save_every": 3, "grad_accumulation_steps": 4}, "checkpoint.steps", 1),
        ("mlx-lm", {}, "lora.scale", 20.0),
        ("mlx-lm", {}, "lora.num_layers", 16),
        ("mlx-lm", {"num_layers": 0}, "lora.num_layers", -1),
        ("mlx-lm", {}, "train.max_grad_norm", None),
        ("mlx-lm", {}, "optimizer.weight_decay", 0.0),
        ("mlx-lm", {}, "scheduler.name", "constant"),
        ("mlx-lm", {"mask_prompt": True}, "data.train_on", "last"),
        ("mlx-lm", {}, "data.train_on", "all"),
        (
            "mlx-lm",
            {"optimizer": "adamw", "optimizer_config": {"adamw": {"betas": [0.8, 0.9]}}},
            "optimizer.betas",
            (0.8, 0.9),
        ),
        ("mlx-lm", {"report_to": "wandb", "project_name": "mine"}, "wandb.project", "mine"),
        ("mlx-lm", {"hf_dataset": {"path": "o/r", "config": {"name": "en"}}}, "data.train.0.subset", "en"),
        ("mlx-lm", {"hf_dataset": [{"path": "o/r", "valid_split": "test"}]}, "data.validation.0.split", "test"),
        (
            "mlx-lm",
            {"hf_dataset": {"path": "o/r", "prompt_feature": "q", "completion_feature": "a"}},
            "data.train.0.columns",
            {"prompt": "q", "completion": "a"},
        ),
    ],
)
def test_value(name: str, values: dict[str, Any], key: str, expected: Any) -> None:
    assert value(config(of(name, **values)), key) == expected


@pytest.mark.parametrize("name", ["axolotl", "llamafactory"])
def test_batch_sizes_are_multiplied(name: str) -> None:
    micro = "micro_batch_size" if name == "axolotl" else "per_device_train_batch_size"
    translation = of(name, 3, **{micro: 2, "gradient_accumulation_steps": 4})
    assert config(translation).train.global_batch_size == 24
    assert config(translation).train.micro_batch_size == 2
    assert "2 per device x 4 accumulated x 3 devices" in to_text(translation, "a")


@pytest.mark.parametrize(
    ("schedule", "name", "rate", "ratio"),
    [
        ({"name": "cosine_decay", "arguments": [2e-5, 1000, 1e-6]}, "cosine", 2e-5, 0.05),
        ({"name": "linear_schedule", "arguments": [2e-5, 1e-6, 1000]}, "linear", 2e-5, 0.05),
        ({"name": "cosine_decay", "arguments": [2e-5, 1000]}, "cosine", 2e-5, 0.0),
        ({"name": "exponential_decay", "arguments": [2e-5, 0.9]}, "cosine", 2e-5, 0.0),
    ],
)
def test_arguments_of_a_schedule(schedule: dict[str, Any], name: str, rate: float, ratio: float) -> None:
    found = config(of("mlx-lm", learning_rate=1e-3, lr_schedule={**schedule, "warmup": 7, "warmup_init": 0.0}))
    assert (found.scheduler.name, found.optimizer.learning_rate) == (name, rate)
    assert found.scheduler.min_lr_ratio == pytest.approx(ratio)
    assert found.scheduler.warmup_steps == 7


@pytest.mark.parametrize(
    ("name", "values", "key", "kind", "words"),
    [
        ("axolotl", {"rl": "dpo"}, "rl", "refused", "preferences"),
        ("axolotl", {"processor_type": "AutoProcessor"}, "processor_type", "refused", "text alone"),
        ("axolotl", {"adapter": "ia3"}, "adapter", "refused", "use lora"),
        ("axolotl", {"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters", "refused", "another part"),
        ("axolotl", {"learning_rate": "fast"}, "learning_rate", "refused", "is not a number"),
        ("axolotl", {"adapter": "lora", "lora_r": 1.5}, "lora_r", "refused", "not a whole number"),
        ("axolotl", {"max_steps": True}, "max_steps", "refused", "is not a number"),
        ("axolotl", {"micro_batch_size": 0}, "micro_batch_size", "refused", "at least 1"),
        ("mlx-lm", {"grad_accumulation_steps": 0}, "grad_accumulation_steps", "refused", "at least 1"),
        ("axolotl", {"train_on_inputs": "perhaps"}, "train_on_inputs", "refused", "neither true nor false"),
        ("axolotl", {"gradient_accumulation_steps": 0.5}, "gradient_accumulation_steps", "refused", "whole"),
        ("axolotl", {"reward_model": False}, "reward_model", "not needed", "switched off"),
        ("axolotl", {"load_in_4bit": False}, "load_in_4bit", "not needed", "switched off"),
        ("axolotl", {"bf16": False}, "bf16", "not needed", "switched off"),
        ("axolotl", {"gptq": True}, "gptq", "no counterpart", "stored quantised"),
        ("axolotl", {"load_in_4bit": None}, "load_in_4bit", "not needed", "empty"),
        ("axolotl", {"val_set_size": 100}, "val_set_size", "no counterpart", "100 rows"),
        ("axolotl", {"saves_per_epoch": 4}, "saves_per_epoch", "no counterpart", "in steps"),
        ("axolotl", {"save_strategy": "epoch"}, "save_strategy", "no counterpart", "in steps"),
        ("axolotl", {"eval_strategy": "steps"}, "eval_strategy", "not needed", "eval.steps says it"),
        ("axolotl", {"save_steps": 0.25}, "save_steps", "no counterpart", "a share"),
        ("axolotl", {"optimizer": "muon"}, "optimizer", "no counterpart", "AdamW takes its place"),
        ("axolotl", {"lr_scheduler": "polynomial"}, "lr_scheduler", "no counterpart", "cosine takes its place"),
        ("axolotl", {"lora_r": 8}, "lora_r", "not needed", "there is no adapter"),
        (
            "axolotl",
            {"adapter": "lora", "lora_target_modules": "layers.[0-9]+"},
            "lora_target_modules",
            "no counterpart",
            "regular",
        ),
        (
            "axolotl",
            {"adapter": "lora", "lora_target_linear": True, "lora_target_modules": ["q"]},
            "lora_target_modules",
            "not needed",
            "lora_target_linear",
        ),
        ("axolotl", {"fsdp_config": {"offload_params": True}}, "fsdp_config.offload_params", "not needed", "GPUs"),
        ("axolotl", {"sequence_length": 5}, "sequence_length", "no counterpart", "is not known here"),
        (
            "axolotl",
            {"wandb_name": "a", "wandb_run_name": "b"},
            "wandb_run_name",
            "no counterpart",
            "wandb.name is a already",
        ),
        ("axolotl", {"wandb_log_model": "end"}, "wandb_log_model", "not needed", "switched off"),
        ("axolotl", {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "plugins", "not needed", "computed there"),
        ("axolotl", {"plugins": ["mine.Plugin"]}, "plugins", "no counterpart", "can change anything"),
        ("axolotl", {"bf16": "auto", "fp16": True}, "bf16", "not needed", "switched off"),
        ("axolotl", {"bf16": False}, "bf16", "not needed", "off"),
        ("llamafactory", {"stage": "dpo"}, "stage", "refused", "here it is sft"),
        ("llamafactory", {"stage": "sft"}, "stage", "not needed", "what is done here"),
        ("llamafactory", {"finetuning_type": "freeze"}, "finetuning_type", "refused", "lora, dora or full"),
        ("llamafactory", {"do_train": False}, "do_train", "refused", "nothing is trained"),
        ("llamafactory", {"do_train": True}, "do_train", "not needed", "trains"),
        ("llamafactory", {"mask_history": False}, "mask_history", "not needed", "switched off"),
        ("llamafactory", {"packing": False}, "packing", "mapped", ""),
        ("llamafactory", {"report_to": "none"}, "report_to", "not needed", "switched off"),
        ("llamafactory", {"quantization_bit": 5}, "quantization_bit", "no counterpart", "2, 3, 4, 6, 8 bits"),
        ("llamafactory-v1", {"peft_config": {"name": "freeze"}}, "peft_config.name", "refused", "lora"),
        ("llamafactory-v1", {"optim_config": {"name": "muon"}}, "optim_config.name", "no counterpart", "AdamW"),
        ("mlx-lm", {"fine_tune_type": "half"}, "fine_tune_type", "refused", "lora, dora or full"),
        ("mlx-lm", {"fine_tune_type": "full", "num_layers": 8}, "num_layers", "refused", "last layers"),
        ("mlx-lm", {"fine_tune_type": "full", "num_layers": -1}, "num_layers", "not needed", "everything"),
        ("mlx-lm", {"optimizer": "sgd"}, "optimizer", "no counterpart", "AdamW"),
        (
            "mlx-lm",
            {"lr_schedule": {"name": "cosine_decay", "arguments": []}},
            "lr_schedule.arguments",
            "refused",
            "list",
        ),
        ("mlx-lm", {"lr_schedule": {"warmup_init": 1e-7}}, "lr_schedule.warmup_init", "no counterpart", "from 0"),
        (
            "mlx-lm",
            {"optimizer_config": {"sgd": {"momentum": 0.9}}},
            "optimizer_config.sgd.momentum",
            "not needed",
            "not chosen",
        ),
        (
            "mlx-lm",
            {"optimizer_config": {"adam": {"bias_correction": True}}},
            "optimizer_config.adam.bias_correction",
            "not needed",
            "always",
        ),
        ("mlx-lm", {"optimizer_config": {"adam": {"eps": 1e-6}}}, "optimizer_config.adam.eps", "mapped", ""),
        ("mlx-lm", {"optimizer_config": {"adam": {"foo": 1}}}, "optimizer_config.adam.foo", "no counterpart", "betas"),
        ("mlx-lm", {"hf_dataset": {"path": "o/r"}}, "data", "not needed", "hf_dataset"),
    ],
)
def test_fate(name: str, values: dict[str, Any], key: str, kind: str, words: str) -> None:
    found = fate(of(name, **values), key)
    assert found[0] == kind
    assert words in found[1]
