"""Which key of ours was meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

import yaml

from mlx_distributed.config.checks import listed
from mlx_distributed.config.schema import Config, SourceConfig

# The same under another name, in the same unit: taken for ours within the right section.
ALIASES = {
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target_modules",
    "data.max_seq_length": "cutoff_len sequence_len max_length",
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.epochs": "num_train_epochs num_epochs",
    "train.max_grad_norm": "clip_grad_norm",
    "train.neftune_noise_alpha": "noisy_embedding_alpha",
    "optimizer.learning_rate": "lr",
    "optimizer.eps": "adam_epsilon",
    "checkpoint.steps": "save_steps",
    "eval.steps": "eval_steps",
    "logging.steps": "logging_steps",
}

# What else other trainers (transformers, TRL, Axolotl, LLaMA-Factory, torchtune, LitGPT, mlx-lm) say for it.
SPELLINGS = {
    "model.path": "model_name_or_path base_model checkpoint_dir model_name model.name",
    "model.revision": "revision_of_model model_revision",
    "model.dtype": "torch_dtype",
    "model.quantize": "load_in_4bit load_in_8bit quantization_bit quantization q_bits q_group_size",
    "precision": "bf16 fp16 mixed_precision compute_dtype",
    "method": "finetuning_type fine_tune_type adapter use_peft use_dora",
    "lora": "lora_parameters lora_config peft_config",
    "lora.target_modules": "lora_target lora_target_linear lora_attn_modules keys",
    "lora.num_layers": "lora_layers layers_to_transform peft_layers_to_transform",
    "data.train": "dataset dataset_name datasets hf_dataset train_file data.path data.dataset",
    "data.validation": "eval_dataset test_datasets dataset_val validation_file valid",
    "data.val_fraction": "val_set_size val_size test_split_size val_split_fraction",
    "data.train.0.format": "formatting type",
    "data.train.0.columns": "column_map message_property_mappings field_messages",
    "data.train.0.weight": "interleave_probs",
    "data.max_seq_length": "max_seq_len model_max_length",
    "data.packing": "sample_packing neat_packing dataset_packing",
    "data.streaming": "stream",
    "data.shuffle_buffer": "buffer_size shuffle_buffer_size streaming_buffer_size",
    "data.cache_dir": "tokenized_path dataset_prepared_path",
    "data.overlong": "truncation_mode truncation_type excess_length_strategy",
    "data.chat_template": "template chat_template_path chat_template_jinja prompt_template prompt_style",
    "data.train_on": "train_on_inputs train_on_prompt mask_prompt mask_history roles_to_train masking_strategy "
    "assistant_only_loss completion_only_loss",
    "data.train_on_eos": "train_on_eot",
    "train.micro_batch_tokens": "max_tokens_per_batch max_tokens_in_batch tokens_per_batch",
    "train.global_batch_size (all workers together) and train.micro_batch_size": "batch_size train_batch_size "
    "gradient_accumulation_steps grad_accumulation_steps",
    "train.max_steps": "iters max_iters num_steps steps",
    "train.max_grad_norm": "max_norm gradient_clipping grad_clip",
    "train.gradient_checkpointing": "grad_checkpoint enable_activation_checkpointing",
    "optimizer.name": "optim",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "scheduler": "lr_schedule",
    "scheduler.name": "lr_scheduler lr_scheduler_type",
    "scheduler.warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "scheduler.warmup_ratio": "lr_warmup_fraction",
    "scheduler.min_lr_ratio": "min_lr",
    "parallel.nproc": "world_size num_processes nproc_per_node",
    "eval.steps": "steps_per_eval eval_strategy evals_per_epoch run_val_every_n_steps",
    "eval.max_examples": "val_batches",
    "eval.generate": "predict_with_generate",
    "checkpoint.steps": "save_every save_every_n_steps save_interval saves_per_epoch",
    "eval.patience": "early_stopping_patience early_stopping",
    "eval.min_delta": "early_stopping_threshold early_stopping_min_delta",
    "checkpoint.metric_for_best": "metric_for_best_model",
    "checkpoint.final": "load_best_model_at_end",
    "the option --resume": "resume resume_from_checkpoint auto_resume_from_checkpoints resume_adapter_file",
    "logging.steps": "steps_per_report log_every_n_steps log_interval",
    "wandb.project": "wandb_project project_name report_to",
    "wandb.entity": "wandb_entity",
    "wandb.name": "run_name wandb_name",
    "wandb.mode": "wandb_mode",
    "wandb.log_checkpoints": "wandb_log_model",
    "seed": "data_seed",
    "output_dir": "adapter_path out_dir",
}


OURS_BY_ALIAS = {theirs: ours for ours, names in ALIASES.items() for theirs in names.split()}


def canonical(names: Sequence[str]) -> Sequence[str]:
    """The parts of a dotted key, with our name for an alias in its section."""
    section, _, ours = OURS_BY_ALIAS.get(names[-1], "").rpartition(".")
    return [section, ours] if list(names[:-1]) == [section] else names


def rename_aliases(root: yaml.MappingNode) -> None:
    """Write our names for aliases. One beside ours makes a key that stands twice, which is refused."""
    for section, node in root.value:
        if isinstance(node, yaml.MappingNode):
            for name, _ in node.value:
                if isinstance(name, yaml.ScalarNode) and isinstance(section, yaml.ScalarNode):
                    name.value = canonical([section.value, name.value])[-1]


def unknown_key(key: str, siblings: Collection[str]) -> tuple[str, str | None]:
    """What to say about a key that does not exist, and the key of ours that was meant, if one was.

    Args:
        key: dotted, as it was written.
        siblings: the names that do exist beside it.
    """
    section, _, name = key.rpartition(".")
    if ours := _OURS.get(key) or _OURS.get(name):
        return f"unknown key; write {ours}", ours
    if near := get_close_matches(name, siblings, 1, 0.7):
        ours = f"{section}.{near[0]}" if section else near[0]
    elif near := get_close_matches(name, _OURS, 1, 0.7):
        ours = _OURS[near[0]]
    else:
        return f"unknown key; the keys here are {', '.join(siblings)}", None
    return f"unknown key; did you mean {ours}?", ours


def _keys(section: object, prefix: str) -> Iterator[str]:
    for field in fields(section):  # type: ignore[arg-type]  # an instance of a dataclass
        yield prefix + field.name
        child = getattr(section, field.name)
        if is_dataclass(child):
            yield from _keys(child, f"{prefix}{field.name}.")


def _ours() -> dict[str, str]:
    """Every bare name that means something: ours without their section, and those of others."""
    places: dict[str, list[str]] = {}
    for key in [*_keys(Config(), ""), *_keys(SourceConfig(), "data.train.0.")]:
        places.setdefault(key.rpartition(".")[2], []).append(key)
    others = {theirs: ours for ours, names in SPELLINGS.items() for theirs in names.split()}
    return {name: listed(keys) for name, keys in places.items()} | others | OURS_BY_ALIAS


_OURS = _ours()
