"""Keys of the transformers trainer, which Axolotl and LLaMA-Factory pass on to it."""

from __future__ import annotations

from typing import Any

from mlx_distributed.cli.import_config.rules import (
    Fate,
    Place,
    Rule,
    Theirs,
    choose,
    count,
    each,
    instead,
    mapped,
    missing,
    names,
    number,
    off,
    only_if,
    refuse,
    switch,
    to,
    to_output,
    unneeded,
    whole,
)
from mlx_distributed.config.names import OURS_BY_ALIAS

BITS = (2, 3, 4, 6, 8)
ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision")


def same(keys: str, convert: Any) -> dict[str, Rule]:
    """Keys that our configuration takes as aliases of its own."""
    return {key: to(OURS_BY_ALIAS[key], convert) for key in keys.split()}


def alpha(rank: str, rslora: str) -> Rule:
    """That of adapters; with `rslora`, divided by the root of the rank."""

    def decide(value: Any, place: Place) -> Fate:
        if not place.theirs.on(rslora):
            return mapped({"lora.alpha": number(value)})
        root = count(place.theirs.get(rank)) ** 0.5
        return mapped({"lora.scale": number(value) / root}, f"alpha / sqrt(rank), as {rslora} says")

    return Rule(decide, ("lora.alpha", "lora.scale"))


def _layers(value: Any, place: Place) -> Fate:
    return mapped({"lora.target_modules": "all-linear" if names(value) == ["all"] else names(value)})


LAYERS = Rule(_layers, ("lora.target_modules",))
"""Names of those with adapters; `all` are the linear ones."""


def devices(num_devices: int) -> str:
    return "1 device" if num_devices == 1 else f"{num_devices} devices"


def batch(micro: str) -> dict[str, Rule]:
    """The size of a batch: of a device, which `micro` says, times accumulated ones, times devices."""

    def total(value: Any, place: Place) -> Fate:
        theirs = place.theirs
        size = count(theirs.get(micro))
        accumulated = count(theirs.get("gradient_accumulation_steps"))
        if place.key == micro:
            return mapped({"train.micro_batch_size": size})
        words = f"{size} per device x {accumulated} accumulated x {devices(theirs.num_devices)}"
        return mapped({"train.global_batch_size": size * accumulated * theirs.num_devices}, words)

    rule = Rule(total, ("train.global_batch_size", "train.micro_batch_size"))
    return {micro: rule, "gradient_accumulation_steps": rule}


def _max_steps(value: Any, place: Place) -> Fate:
    if whole(value) < 1:
        return Fate("not needed", "the epochs decide")
    return mapped({"train.max_steps": whole(value)})


def _optimizer(value: Any, place: Place) -> Fate:
    ours = {"optimizer.name": "adamw"}
    if isinstance(value, str) and "adamw" in value:
        return mapped(ours, "" if value in ADAMW else "its moments are float32 here")
    return Fate("no counterpart", "AdamW takes its place, which may need another learning rate", ours)


def _betas(value: Any, place: Place) -> Fate:
    given = [place.theirs.get(f"adam_beta{index}") for index in (1, 2)]
    betas = [default if beta is None else number(beta) for beta, default in zip(given, (0.9, 0.999), strict=True)]
    return mapped({"optimizer.betas": betas})


def _constant(theirs: Theirs) -> bool:
    return "constant" in (theirs.get("lr_scheduler"), theirs.get("lr_scheduler_type"))


def _warmup(value: Any, place: Place) -> Fate:
    """`warmup_steps` wins over `warmup_ratio`, and is one itself below 1. `constant` knows no warm-up."""
    targets = ("scheduler.warmup_steps", "scheduler.warmup_ratio")
    if _constant(place.theirs):
        return mapped({targets[0]: 0}, "the schedule constant has no warm-up there")
    if place.name == "warmup_ratio":
        if place.theirs.on("warmup_steps"):
            return Fate("not needed", "warmup_steps wins")
        return mapped({targets[1]: number(value)})
    if off(value) and place.theirs.on("warmup_ratio"):
        return Fate("not needed", "warmup_ratio says it")
    if 0 < number(value) < 1:
        return mapped({targets[1]: number(value)}, "a share of all steps")
    return mapped({targets[0]: whole(value)})


def _every(target: str, strategies: tuple[str, ...]) -> Rule:
    """So many steps, where none of the `strategies` says that something else counts."""

    def decide(value: Any, place: Place) -> Fate:
        chosen = [place.theirs.get(strategy) for strategy in strategies]
        if any(strategy in ("no", False, "epoch", "best") for strategy in chosen):
            return Fate("not needed", "steps do not count there")
        steps = number(value)
        if 0 < steps < 1:
            if not place.theirs.on("max_steps"):
                return Fate("no counterpart", f"a share of all steps; {target} is in steps")
            steps = max(1, round(steps * count(place.theirs.get("max_steps"))))
        return mapped({target: count(steps)})

    return Rule(decide, (target,))


def _strategy(target: str) -> Rule:
    """When something is done: never by itself, every so many steps, or per epoch."""

    def decide(value: Any, place: Place) -> Fate:
        if off(value):
            return mapped({target: None}, "only at the end")
        if value == "steps":
            return Fate("not needed", f"{target} says it")
        return Fate("no counterpart", f"{target} is in steps")

    return Rule(decide, (target,))


def _per_epoch(target: str) -> Rule:
    def decide(value: Any, place: Place) -> Fate:
        return mapped({target: None}, "only at the end") if off(value) else per_epoch.decide(value, place)

    per_epoch = missing(f"{target} is in steps")
    return Rule(decide, (target,))


def _validation(value: Any, place: Place) -> Fate:
    size = number(value)
    if off(value) or size == 0:
        return Fate("not needed", "switched off")
    if size >= 1:
        return Fate("no counterpart", f"{size:g} rows; data.val_fraction is a share of the rows, to be set by hand")
    return mapped({"data.val_fraction": size})


def trackers(value: Any, project: str | None, otherwise: str) -> Fate:
    """`report_to`, in a run that Weights & Biases knows as `project`."""
    if off(value) or value == ["none"]:
        return Fate("not needed", "switched off")
    ours = {"wandb.project": project or otherwise} if {"wandb", "all"} & {*names(value)} else {}
    others = [name for name in names(value) if name not in ("wandb", "none")]
    if others:
        return Fate("no counterpart", "of trackers, there is Weights & Biases", ours)
    return mapped(ours)


def _precision(value: Any, place: Place) -> Fate:
    """`auto` is bf16 where the hardware has it, unless fp16 is asked for."""
    wanted = not place.theirs.on("fp16") if value == "auto" else value == "full" or switch(value)
    if not wanted:
        return Fate("not needed", "switched off")
    return mapped({"precision": place.name}, "whatever is trained is float32 besides")


def quantised(bits: int | None) -> Rule:
    """A switch for weights of so many bits; None where the value says how many."""

    def decide(value: Any, place: Place) -> Fate:
        if off(value):
            return Fate("not needed", "switched off")
        num_bits = count(value) if bits is None else bits
        if num_bits not in BITS or (bits and not switch(value)):
            return Fate("no counterpart", f"weights are quantised to {', '.join(map(str, BITS))} bits")
        return mapped({"model.quantize.bits": num_bits}, "in groups of 64, each with a scale and an offset")

    return Rule(decide, ("model.quantize.bits",))


def _early(value: Any, place: Place) -> Fate:
    return Fate("not needed", "switched off") if off(value) else mapped({"eval.patience": count(value)})


def _streaming(value: Any, place: Place) -> Fate:
    needs = "needs train.max_steps, and .jsonl or .parquet files or a data set of the hub"
    return mapped({"data.streaming": switch(value)}, needs if value else "")


def if_streamed(rule: Rule) -> Rule:
    """For keys that say more about `streaming`."""
    return only_if(lambda theirs: theirs.on("streaming"), rule, "data are not streamed")


ONE_PROGRAM = unneeded("of how the model is spread over GPUs; here every worker holds it, or see parallel.pipeline")
KERNELS = unneeded("of how it is computed there")
LOADING = unneeded("of how the data are read")
OBJECTIVE = refuse("trains by another objective than that of answers")
QUANTISED = missing("model.quantize has bits and group_size alone; or give a model that is stored quantised")

RULES: dict[str, Rule] = {
    **same("logging_steps", count),
    "max_grad_norm": to("train.max_grad_norm", lambda value: number(value) or None),
    "learning_rate": to("optimizer.learning_rate", number),
    "weight_decay": to("optimizer.weight_decay", number),
    "max_steps": Rule(_max_steps, ("train.max_steps",)),
    **same("adam_epsilon", number),
    **each("adam_beta1 adam_beta2", Rule(_betas, ("optimizer.betas",))),
    "seed": to("seed", whole),
    "output_dir": Rule(to_output, ("output_dir",)),
    "trust_remote_code": to("model.trust_remote_code", switch),
    **each("optim optimizer", Rule(_optimizer, ("optimizer.name",))),
    **each(
        "lr_scheduler lr_scheduler_type",
        choose(
            "scheduler.name",
            {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"},
            instead("cosine takes its place", {"scheduler.name": "cosine"}),
        ),
    ),
    **each("warmup_steps warmup_ratio", Rule(_warmup, ("scheduler.warmup_steps", "scheduler.warmup_ratio"))),
    "gradient_checkpointing": to("train.gradient_checkpointing", lambda value: not off(value)),
    "streaming": Rule(_streaming, ("data.streaming",)),
    "neftune_noise_alpha": to("train.neftune_noise_alpha", lambda value: None if off(value) else number(value)),
    "save_steps": _every("checkpoint.steps", ("save_strategy",)),
    "save_strategy": _strategy("checkpoint.steps"),
    "saves_per_epoch": _per_epoch("checkpoint.steps"),
    "save_total_limit": to("checkpoint.save_total_limit", count),
    "eval_steps": _every("eval.steps", ("eval_strategy", "evaluation_strategy")),
    **each("eval_strategy evaluation_strategy", _strategy("eval.steps")),
    "evals_per_epoch": _per_epoch("eval.steps"),
    **each("val_set_size val_size", Rule(_validation, ("data.val_fraction",))),
    "load_best_model_at_end": to("checkpoint.final", lambda value: "best" if switch(value) else "last"),
    "metric_for_best_model": choose(
        "checkpoint.metric_for_best",
        {"loss": "eval/loss", "eval_loss": "eval/loss", "perplexity": "eval/perplexity"},
        missing("evaluations are compared by checkpoint.metric_for_best"),
    ),
    **each("early_stopping_patience early_stopping_steps", Rule(_early, ("eval.patience",))),
    "run_name": to("wandb.name", str),
    **each("bf16 fp16", Rule(_precision, ("precision",))),
    **each("resume_from_checkpoint auto_resume_from_checkpoints", missing("say mlx-train --resume")),
    **each(
        "deepspeed fsdp fsdp_config fsdp_version ddp ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers local_rank world_size device_map ddp_backend accelerator_config use_ray ray_num_workers "
        "low_cpu_mem_usage activation_offloading deepcompile",
        ONE_PROGRAM,
    ),
    **each("tf32 torch_compile torch_compile_mode torch_compile_backend torch_compile_options flash_attn", KERNELS),
    **each(
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor remove_unused_columns "
        "preprocessing_num_workers",
        LOADING,
    ),
    **each("per_device_eval_batch_size eval_batch_size", unneeded("does not change what is measured")),
    **each("greater_is_better", unneeded("follows from the metric")),
    **each("gradient_checkpointing_kwargs use_reentrant_gc save_safetensors", unneeded("an inner setting there")),
    **each("save_only_model", unneeded("checkpoints can always be resumed from")),
    "group_by_length": unneeded("changes only how fast a step is"),
    **each("fp8 fp8_backend fp8_enable_fsdp_float8_all_gather", missing("there is no arithmetic of 8 bits")),
    **each("hub_model_id hub_strategy push_to_hub", missing("nothing is uploaded by a run")),
    **each("lr_scheduler_kwargs", missing("schedules take scheduler.min_lr_ratio alone")),
    **each("pad_to_sequence_len pad_to_multiple_of", unneeded("padding is never trained on")),
}
