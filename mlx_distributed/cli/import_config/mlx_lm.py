"""mlx-lm. Keys and defaults as of its 0.32 (`mlx_lm/lora.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distributed.cli.import_config.rules import (
    Fate,
    Place,
    Rule,
    Theirs,
    Tool,
    Unusable,
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
    switch,
    text,
    to,
    to_output,
    to_path,
    unneeded,
    whole,
)
from mlx_distributed.cli.import_config.trainer import trackers

ENTRY = "data.train.*"


def _adapted(theirs: Theirs) -> bool:
    return theirs.get("fine_tune_type") in ("lora", "dora")


def _method(value: Any, place: Place) -> Fate:
    if value not in ("lora", "dora", "full"):
        raise Unusable("must be lora, dora or full")
    return mapped({"method": value})


def _accumulated(theirs: Theirs) -> int:
    return count(theirs.values.get("grad_accumulation_steps", 1))


def _batch(value: Any, place: Place) -> Fate:
    size, times = count(place.theirs.get("batch_size")), _accumulated(place.theirs)
    ours = {"train.global_batch_size": size * times}
    words = f"{size} over all devices x {times} accumulated"
    return mapped({**ours, "train.micro_batch_size": size} if place.key == "batch_size" else ours, words)


def _iterations(target: str) -> Rule:
    """Theirs are micro-steps; ours are optimizer steps."""

    def decide(value: Any, place: Place) -> Fate:
        times = _accumulated(place.theirs)
        words = f"{count(value)} / {times} accumulated" if times > 1 else ""
        return mapped({target: max(count(value) // times, 1)}, words)

    return Rule(decide, (target,))


def _optimizer(value: Any, place: Place) -> Fate:
    # Neither corrects the bias of its moments there, unless `bias_correction` is set.
    decay = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.0}
    if value == "adam":
        return mapped(decay, "without decay of weights; its moments are corrected for their bias here")
    if value == "adamw":
        return mapped({"optimizer.name": "adamw"}, "its moments are corrected for their bias here")
    return Fate("no counterpart", "AdamW takes its place, which may need another learning rate", decay)


def _option(value: Any, place: Place) -> Fate:
    """`optimizer_config.<optimizer>.<option>`."""
    chosen, option = place.key.split(".")[1:3] if place.key.count(".") == 2 else ("", "")
    if chosen != place.theirs.get("optimizer"):
        return Fate("not needed", "of an optimizer that is not chosen")
    if option == "betas" and isinstance(value, list):
        return mapped({"optimizer.betas": [number(beta) for beta in value]})
    if option in ("eps", "weight_decay") and chosen in ("adam", "adamw"):
        return mapped({f"optimizer.{option}": number(value)})
    if option == "bias_correction" and switch(value):
        return Fate("not needed", "is always done")
    return Fate("no counterpart", "of the optimizer there are betas, eps and weight_decay")


def _schedule(theirs: Theirs) -> Mapping[str, Any]:
    schedule = theirs.get("lr_schedule")
    return schedule if isinstance(schedule, Mapping) else {}


def _arguments(value: Any, place: Place) -> Fate:
    """cosine_decay: rate, steps, rate at the end; linear_schedule: rate, rate at the end, steps."""
    if not isinstance(value, list) or not value:
        raise Unusable("is not a list of numbers")
    numbers = [number(each) for each in value]
    ours: dict[str, Any] = {"optimizer.learning_rate": numbers[0]}
    name = _schedule(place.theirs).get("name")
    if name not in ("cosine_decay", "linear_schedule"):
        return Fate("no counterpart", "only the first argument is taken, the learning rate", ours)
    end = 2 if name == "cosine_decay" else 1
    if len(numbers) > end and numbers[0] > 0:
        ours["scheduler.min_lr_ratio"] = numbers[end] / numbers[0]
    return mapped(ours, "rate and rate at the end; here it falls over the whole run")


def _rate(value: Any, place: Place) -> Fate:
    if _schedule(place.theirs).get("arguments"):
        return Fate("not needed", "lr_schedule.arguments says it")
    return mapped({"optimizer.learning_rate": number(value)})


def _data(value: Any, place: Place) -> Fate:
    """A folder with train.jsonl and perhaps valid.jsonl, or a data set of the hub with such splits."""
    if place.theirs.on("hf_dataset"):
        return Fate("not needed", "hf_dataset says it")
    train, valid = (place.theirs.find(f"{text(value)}/{name}.jsonl") for name in ("train", "valid"))
    if train is not None:
        ours = {"data.train.0.path": train} | ({"data.validation.0.path": valid} if valid else {})
        return mapped(ours, "the files train.jsonl and, where it is there, valid.jsonl")
    return mapped(
        {"data.train.0.path": place.theirs.path(text(value))},
        "if that is a data set on the hub with a split valid, add it as data.validation",
    )


def _sources(value: Any, place: Place) -> Fate:
    """A data set of the hub; its validation rows are another split of the same."""
    validation = {
        "data.validation.*.path": text(value),
        "data.validation.*.split": _split(place, "valid_split", "train[-10%:]"),
    }
    train = {f"{ENTRY}.path": text(value), f"{ENTRY}.split": _split(place, "train_split", "train[:80%]")}
    return mapped({place.fill(target): each for target, each in (train | validation).items()})


def _split(place: Place, key: str, default: str) -> str:
    found = place.theirs.get("hf_dataset")
    entry = found[int(place.index)] if isinstance(found, list) else found
    return text(entry.get(key) or default)


def _both(inner: str, column: str | None = None) -> Rule:
    """What holds for training and validation rows alike."""
    targets = (f"{ENTRY}.{inner}", f"data.validation.*.{inner}")

    def decide(value: Any, place: Place) -> Fate:
        ours = text(value) if column is None else {column: text(value)}
        return mapped({place.fill(target): ours for target in targets})

    return Rule(decide, targets)


def _masked(value: Any, place: Place) -> Fate:
    if switch(value):
        return mapped({"data.train_on": "last"}, "only the last message is trained on there")
    return mapped({"data.train_on": "all"})


def _layers(value: Any, place: Place) -> Fate:
    layers = whole(value)
    if _adapted(place.theirs):
        return mapped({"lora.num_layers": layers if layers > 0 else -1})
    if layers == -1:
        return Fate("not needed", "everything is trained")
    return Fate("refused", "with fine_tune_type full the last layers alone are trained there; here it is everything")


def _report(value: Any, place: Place) -> Fate:
    return trackers(value, place.theirs.get("project_name"), "mlx-lm")


def _warmup_init(value: Any, place: Place) -> Fate:
    return (
        Fate("not needed", "the rate rises from 0")
        if number(value) == 0
        else Fate("no counterpart", "the rate rises from 0")
    )


def _implied(theirs: Theirs) -> Mapping[str, Any]:
    ours: dict[str, Any] = {"data.overlong": "truncate", "train.max_grad_norm": None}
    if not _schedule(theirs):
        ours["scheduler.name"] = "constant"
    if off(_schedule(theirs).get("warmup")):
        ours["scheduler.warmup_steps"] = 0
    if _adapted(theirs) and not theirs.get("lora_parameters"):
        ours |= {"lora.rank": 8, "lora.scale": 20.0}
    return ours


SOURCE = {
    "path": Rule(_sources, (f"{ENTRY}.path", f"{ENTRY}.split", "data.validation.*.path", "data.validation.*.split")),
    **each("train_split valid_split", unneeded("is taken with the path")),
    "test_split": missing("there is training and validation"),
    "prompt_feature": _both("columns", "prompt"),
    "completion_feature": _both("columns", "completion"),
    "text_feature": _both("columns", "text"),
    "chat_feature": _both("columns", "messages"),
    "config.name": _both("subset"),
    "config": missing("of a data set there are path, split and subset"),
}


def _lora(rule: Rule) -> Rule:
    return only_if(_adapted, rule, "there is no adapter")


MLX_LM = Tool(
    name="mlx-lm",
    title="mlx-lm",
    defaults={
        "fine_tune_type": "lora",
        "optimizer": "adam",
        "num_layers": 16,
        "batch_size": 4,
        "iters": 1000,
        "learning_rate": 1e-5,
        "steps_per_eval": 200,
        "mask_prompt": False,
        "adapter_path": "adapters",
    },
    implied=_implied,
    rules={
        **{f"hf_dataset.{key}": rule for key, rule in SOURCE.items()},
        **{f"hf_dataset.*.{key}": rule for key, rule in SOURCE.items()},
        "model": to_path("model.path"),
        "trust_remote_code": to("model.trust_remote_code", switch),
        "data": Rule(_data, ("data.train.0.path", "data.validation.0.path")),
        "fine_tune_type": Rule(_method, ("method",)),
        "lora_parameters.rank": _lora(to("lora.rank", count)),
        "lora_parameters.scale": _lora(to("lora.scale", number)),
        "lora_parameters.alpha": missing("mlx-lm takes scale"),
        "lora_parameters.dropout": _lora(to("lora.dropout", number)),
        "lora_parameters.keys": _lora(to("lora.target_modules", names)),
        **each("num_layers lora_layers", Rule(_layers, ("lora.num_layers",))),
        **each(
            "batch_size grad_accumulation_steps", Rule(_batch, ("train.global_batch_size", "train.micro_batch_size"))
        ),
        "iters": _iterations("train.max_steps"),
        "save_every": _iterations("checkpoint.steps"),
        "steps_per_eval": _iterations("eval.steps"),
        "steps_per_report": _iterations("logging.steps"),
        "learning_rate": Rule(_rate, ("optimizer.learning_rate",)),
        "lr_schedule.name": choose(
            "scheduler.name",
            {"cosine_decay": "cosine", "linear_schedule": "linear"},
            instead("cosine takes its place", {"scheduler.name": "cosine"}),
        ),
        "lr_schedule.arguments": Rule(_arguments, ("optimizer.learning_rate", "scheduler.min_lr_ratio")),
        "lr_schedule.warmup": to("scheduler.warmup_steps", whole),
        "lr_schedule.warmup_init": Rule(_warmup_init),
        "optimizer": Rule(_optimizer, ("optimizer.name", "optimizer.weight_decay")),
        "optimizer_config": Rule(_option, ("optimizer.betas", "optimizer.eps", "optimizer.weight_decay"), covers=True),
        "max_seq_length": to("data.max_seq_length", count),
        "mask_prompt": Rule(_masked, ("data.train_on",)),
        "grad_checkpoint": to("train.gradient_checkpointing", switch),
        "seed": to("seed", whole),
        "adapter_path": Rule(to_output, ("output_dir",)),
        "report_to": Rule(_report, ("wandb.project",)),
        "project_name": unneeded("is taken with report_to"),
        "train": unneeded("mlx-train trains"),
        **each("test test_batches", missing("there is training and validation, no third set")),
        "val_batches": unneeded("the loss is always over all validation rows"),
        "resume_adapter_file": missing("adapters begin anew; mlx-train --resume goes on from its own checkpoints"),
        **each("config clear_cache_threshold", unneeded("an inner setting there")),
    },
)
