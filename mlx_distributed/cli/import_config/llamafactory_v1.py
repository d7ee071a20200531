"""LLaMA-Factory's second program, v1, whose keys are others (`src/llamafactory/v1/config` of 0.9.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_distributed.cli.import_config.rules import (
    Fate,
    Place,
    Rule,
    Theirs,
    Tool,
    choose,
    count,
    each,
    locate,
    mapped,
    missing,
    number,
    plain,
    refuse,
    switch,
    text,
    to,
    to_output,
    to_path,
    unneeded,
    whole,
)
from mlx_distributed.cli.import_config.trainer import (
    KERNELS,
    LAYERS,
    LOADING,
    ONE_PROGRAM,
    QUANTISED,
    RULES,
    devices,
    same,
)
from mlx_distributed.config.load import read_mapping

PREFERENCES = refuse("trains on preferences, not on answers")
PART = refuse("trains another part of the model: here it is adapters of linear layers, or everything")


def _method(value: Any, place: Place) -> Fate:
    if value == "lora":
        return mapped({"method": "lora"})
    return Fate("refused", "here it is lora, dora or full")


def _global(value: Any, place: Place) -> Fate:
    return mapped({"train.global_batch_size": count(value)})


def _micro(value: Any, place: Place) -> Fate:
    """Without `global_batch_size` a step is one micro-batch of every device."""
    size = count(value)
    if place.theirs.on("global_batch_size"):
        return mapped({"train.micro_batch_size": size})
    total = size * place.theirs.num_devices
    words = f"{size} per device x {devices(place.theirs.num_devices)} are train.global_batch_size"
    return mapped({"train.micro_batch_size": size, "train.global_batch_size": total}, words)


def _datasets(split: str) -> Rule:
    """A YAML file that lists data sets, or one data set."""
    keys = ("path", "format", "split")

    def decide(value: Any, place: Place) -> Fate:
        theirs = place.theirs
        file = locate(text(value), Path.cwd(), theirs.folder)
        if file is None or file.suffix not in (".yaml", ".yml"):
            words = "" if file is not None else "if it is a file that lists data sets, put those here"
            return mapped({f"data.{split}.0.path": theirs.path(text(value))}, words)
        ours: dict[str, Any] = {}
        refused, unknown = [], []
        for index, (name, entry) in enumerate(plain(read_mapping(file)).items()):
            given = entry if isinstance(entry, dict) else {"path": entry}
            converter = given.get("converter", "messages")
            if converter in ("alpaca", "sharegpt"):
                ours[f"data.{split}.{index}.format"] = converter
            elif converter != "messages":
                refused.append(f"{name}.converter={converter}")
            if isinstance(given.get("split"), str):
                ours[f"data.{split}.{index}.split"] = given["split"]
            ours[f"data.{split}.{index}.path"] = theirs.path(str(given.get("path", name)))
            unknown += [f"{name}.{key}" for key in given if key not in ("path", "converter", "split", "source")]
        if refused:
            return Fate("refused", f"in {file.name}, answers alone are for here: {', '.join(refused)}", ours)
        if unknown:
            return Fate("no counterpart", f"in {file.name}: {', '.join(unknown)}", ours)
        return mapped(ours, f"by {file.name}")

    return Rule(decide, tuple(f"data.{split}.*.{key}" for key in keys))


def _optimizer(value: Any, place: Place) -> Fate:
    if value in ("adamw", "torch_adamw"):
        return mapped({"optimizer.name": "adamw"})
    ours = {"optimizer.name": "adamw"}
    return Fate("no counterpart", "AdamW takes its place, which may need another learning rate", ours)


def _implied(theirs: Theirs) -> Mapping[str, Any]:
    return (
        {"data.overlong": "truncate"} if theirs.on("peft_config") else {"data.overlong": "truncate", "method": "full"}
    )


LLAMAFACTORY_V1 = Tool(
    name="llamafactory-v1",
    title="LLaMA-Factory v1",
    defaults={
        "micro_batch_size": 1,
        "cutoff_len": 2048,
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "enable_activation_checkpointing": True,
        "seed": 42,
    },
    implied=_implied,
    rules={
        **same("cutoff_len", count),
        **same("num_train_epochs", number),
        **{
            key: RULES[key]
            for key in ("max_steps", "max_grad_norm", "learning_rate", "bf16", "save_steps", "logging_steps")
        },
        **{key: RULES[key] for key in ("save_total_limit", "resume_from_checkpoint", "trust_remote_code")},
        "seed": to("seed", whole),
        "output_dir": Rule(to_output, ("output_dir",)),
        "model": to_path("model.path"),
        "model_class": choose("method", {}, unneeded("a language model")),
        "peft_config.name": Rule(_method, ("method",)),
        "peft_config.r": to("lora.rank", count),
        "peft_config.lora_alpha": to("lora.alpha", number),
        "peft_config.lora_dropout": to("lora.dropout", number),
        "peft_config.target_modules": LAYERS,
        **each("peft_config.adapter_name_or_path", missing("adapters begin anew; merge them into the model first")),
        **each(
            "peft_config.export_dir peft_config.export_size peft_config.infer_dtype", refuse("belongs to another job")
        ),
        **each("peft_config.freeze_trainable_layers peft_config.freeze_trainable_modules", PART),
        "peft_config.freeze_extra_modules": PART,
        "micro_batch_size": Rule(_micro, ("train.micro_batch_size", "train.global_batch_size")),
        "global_batch_size": Rule(_global, ("train.global_batch_size",)),
        "train_dataset": _datasets("train"),
        "eval_dataset": _datasets("validation"),
        "enable_activation_checkpointing": to("train.gradient_checkpointing", switch),
        "batching_strategy": unneeded("data.packing and train.micro_batch_tokens say how rows are laid together"),
        "batching_workers": LOADING,
        "optim_config.name": Rule(_optimizer, ("optimizer.name",)),
        "optim_config": missing("AdamW takes its place: optimizer.betas, eps and weight_decay"),
        "lr_scheduler_config": missing("scheduler.name is cosine, linear or constant"),
        "quant_config": QUANTISED,
        **each(
            "dist_config dp_size cp_size cp_mode mp_replicate_size mp_shard_size dist_timeout init_config", ONE_PROGRAM
        ),
        **each("kernel_config flash_attn use_v1_kernels full_determinism", KERNELS),
        **each("sample_backend max_new_tokens", unneeded("of generation by hand")),
        **each("pref_loss pref_beta pref_ftx simpo_gamma dpo_label_smoothing ld_alpha", PREFERENCES),
        **each("save_epochs", missing("checkpoint.steps is in steps")),
        "save_ckpt_as_hf": unneeded("final/ is in that form"),
        "template": missing("the tokenizer's own is used; or set data.chat_template to Jinja"),
    },
)
