"""Axolotl. Keys and defaults as of its 0.18 (`src/axolotl/utils/schemas`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distributed.cli.import_config.axolotl_data import PREFERENCES, sources
from mlx_distributed.cli.import_config.rules import (
    Fate,
    Place,
    Rule,
    Theirs,
    Tool,
    choose,
    count,
    each,
    mapped,
    missing,
    names,
    number,
    off,
    only_if,
    refuse,
    switch,
    text,
    to,
    to_path,
    unneeded,
    whole,
)
from mlx_distributed.cli.import_config.trainer import (
    KERNELS,
    LOADING,
    OBJECTIVE,
    ONE_PROGRAM,
    QUANTISED,
    RULES,
    alpha,
    batch,
    if_streamed,
    quantised,
    same,
)

MULTIMODAL = refuse("of a model that sees or hears; text alone is trained on here")
PART = refuse("trains another part of the model: here it is adapters of linear layers, or everything")
ADAPTER = "there is no adapter"


def _adapted(theirs: Theirs) -> bool:
    return theirs.on("adapter")


def _adapter(value: Any, place: Place) -> Fate:
    if value in ("lora", "qlora"):
        return mapped({"method": "dora" if place.theirs.on("peft_use_dora") else "lora"})
    return Fate("refused", "is no adapter that is here; use lora")


def _targets(value: Any, place: Place) -> Fate:
    if place.theirs.on("lora_target_linear"):
        return Fate("not needed", "lora_target_linear says it")
    found = names(value)
    if any(set("\\()[]*|^$") & set(name) for name in found):
        ours = {"lora.target_modules": "all-linear"}
        return Fate("no counterpart", "regular expressions are not taken; all linear layers take their place", ours)
    return mapped({"lora.target_modules": found})


def _lora(rule: Rule) -> Rule:
    return only_if(_adapted, rule, ADAPTER)


def _implied(theirs: Theirs) -> Mapping[str, Any]:
    return {} if _adapted(theirs) else {"method": "full"}


def _wandb_model(value: Any, place: Place) -> Fate:
    if off(value) or not place.theirs.on("wandb_project"):
        return Fate("not needed", "switched off")
    return mapped({"wandb.log_checkpoints" if value == "checkpoint" else "wandb.log_final": True})


def _plugins(value: Any, place: Place) -> Fate:
    known = ("liger", "cut_cross_entropy", "kernels", "expert_parallel")
    if all(any(word in name for word in known) for name in names(value)):
        return KERNELS.decide(value, place)
    return Fate("no counterpart", "a plug-in can change anything: see what it does")


def _packing(value: Any, place: Place) -> Fate:
    words = (
        "train.global_batch_size counts rows, of which a packed sequence there holds several" if value is True else ""
    )
    return mapped({"data.packing": switch(value)}, words)


def _metrics(value: Any, place: Place) -> Fate:
    ours = {"sacrebleu": "bleu", "chrf": "chrf"}
    found = [ours[name] for name in names(value) if name in ours]
    values = {"eval.metrics": found} if found else {}
    if others := [name for name in names(value) if name not in (*ours, "perplexity")]:
        return Fate("no counterpart", f"not measured here: {', '.join(others)}", values)
    return mapped(values) if found else Fate("not needed", "perplexity is always measured")


AXOLOTL = Tool(
    name="axolotl",
    title="Axolotl",
    defaults={
        "gradient_accumulation_steps": 1,
        "sequence_len": 512,
        "micro_batch_size": 1,
        "num_epochs": 1.0,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "lora_dropout": 0.0,
        "seed": 42,
    },
    implied=_implied,
    rules={
        **RULES,
        **batch("micro_batch_size"),
        **{f"datasets.*.{key}": rule for key, rule in sources("train").items()},
        **{f"test_datasets.*.{key}": rule for key, rule in sources("validation").items()},
        "base_model": to_path("model.path"),
        "revision_of_model": to("model.revision", text),
        "adapter": Rule(_adapter, ("method",)),
        "peft_use_dora": _lora(to("method", lambda value: "dora" if switch(value) else "lora")),
        **{key: _lora(rule) for key, rule in same("lora_r", whole).items()},
        **{key: _lora(rule) for key, rule in same("lora_dropout", number).items()},
        "lora_alpha": _lora(alpha("lora_r", "peft_use_rslora")),
        "peft_use_rslora": _lora(unneeded("is in lora.scale")),
        "lora_target_modules": _lora(Rule(_targets, ("lora.target_modules",))),
        "lora_target_linear": _lora(choose("lora.target_modules", {True: "all-linear"}, unneeded("switched off"))),
        "unfrozen_parameters": PART,
        "lora_target_parameters": missing("adapters are of linear layers, experts among them"),
        **each(
            "lora_modules_to_save peft_trainable_token_indices",
            missing("beside adapters nothing else is trained; method: full trains everything"),
        ),
        **each(
            "relora relora_prune_ratio relora_cpu_offload lisa_n_layers lisa_step_interval lisa_layers_attribute", PART
        ),
        **each(
            "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps lr_quadratic_warmup "
            "cosine_constant_lr_ratio eta_min lr_groups embedding_lr embedding_lr_scale loraplus_lr_ratio "
            "loraplus_lr_embedding",
            missing("one rate serves all, by scheduler.name"),
        ),
        "cosine_min_lr_ratio": to("scheduler.min_lr_ratio", number),
        "lora_model_dir": missing("adapters begin anew; or say mlx-train --resume"),
        **each(
            "lora_rank_pattern lora_alpha_pattern peft_layers_to_transform peft_layers_pattern peft_init_lora_weights "
            "peft_layer_replication peft",
            missing("adapters are alike in all layers, and begin at zero"),
        ),
        **each(
            "lora_fan_in_fan_out lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel lora_on_cpu",
            KERNELS,
        ),
        **each(
            "attn_implementation flash_attention sdp_attention xformers_attention flex_attention eager_attention "
            "flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_fuse_mlp flash_optimum flash_attn_rms_norm "
            "fused_attn_kernel gemma4_hybrid_attn_impl use_kernels cut_cross_entropy chunked_cross_entropy tiled_mlp "
            "experts_implementation use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels "
            "llama4_linearized_experts experimental_skip_move_to_device gc_steps torchdistx_path liger_rope "
            "liger_rms_norm liger_rms_norm_gated liger_glu_activation liger_layer_norm "
            "liger_fused_linear_cross_entropy float32 fp32_norms "
            "",
            KERNELS,
        ),
        **each(
            "dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size sequence_parallel_degree "
            "expert_parallel_size expert_parallel_num_nvl_bytes expert_parallel_token_capacity heads_k_stride",
            ONE_PROGRAM,
        ),
        "load_in_4bit": quantised(4),
        "load_in_8bit": quantised(8),
        **each("quantize_moe_experts model_quantization_config", QUANTISED),
        **each("model_quantization_config_kwargs bnb_config_kwargs gptq gptq_groupsize gptq_model_v1", QUANTISED),
        **each("gptq_disable_exllama", QUANTISED),
        **each(
            "qat fake_quant_after_n_steps use_onebitllms llmcompressor", refuse("trains weights for rounding to come")
        ),
        **each("rl rl_beta trl vllm reward_model process_reward_model orpo_alpha simpo_gamma cpo_alpha", PREFERENCES),
        **each("kto_desirable_weight kto_undesirable_weight center_rewards_coefficient num_labels ebft", PREFERENCES),
        **each("diffusion use_eaft use_pose reinit_weights", OBJECTIVE),
        **each("eaft_alpha eaft_k", missing("says more about use_eaft")),
        **each("pretraining_dataset pretrain_multipack_attn", refuse("goes on pretraining on a stream of text")),
        **each(
            "streaming_multipack_buffer_size eval_sample_packing sample_packing_sequentially sample_packing_eff_est "
            "sample_packing_seq_len_multiplier sample_packing_group_size sample_packing_bin_size total_num_tokens",
            unneeded("data.packing needs no such setting"),
        ),
        **each("processor_type processor_kwargs freeze_mm_modules", MULTIMODAL),
        "skip_prepare_dataset": LOADING,
        "plugins": Rule(_plugins),
        "train_on_inputs": to("data.train_on", lambda value: "all" if switch(value) else "assistant"),
        **same("sequence_len", whole),
        **same("num_epochs", number),
        "excess_length_strategy": choose(
            "data.overlong",
            {"drop": "drop", "truncate": "truncate", "raise": "error"},
            missing("data.overlong is drop, truncate or error"),
        ),
        "sample_packing": Rule(_packing, ("data.packing",)),
        "max_packed_sequence_len": missing("data.packing lays the rows of a micro-batch one after the other"),
        "min_sample_len": missing("short rows are kept"),
        "chat_template": choose(
            "data.chat_template",
            {"tokenizer_default": None},
            missing("templates have no names here: the tokenizer's own is used; or set data.chat_template to Jinja"),
        ),
        "chat_template_jinja": to_path("data.chat_template"),
        **each("default_system_message chat_template_kwargs", missing("write it into data.chat_template")),
        **each("eot_tokens special_tokens tokens added_tokens_overrides", missing("tokens are those of the tokenizer")),
        **each(
            "tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common "
            "tokenizer_save_jinja_files model_type is_falcon_derived_model is_llama_derived_model hf_use_auth_token "
            "is_mistral_derived_model is_qwen_derived_model cls_model_config base_model_config model_config "
            "overrides_of_model_config base_model_ignore_patterns type_of_model trust_remote_code_tokenizer",
            unneeded("mlx-lm knows it from the files of the model"),
        ),
        **each("resize_token_embeddings_to_32x shrink_embeddings", missing("the vocabulary stays as it is")),
        **each(
            "dataset_processes dataset_num_proc dataset_keep_in_memory push_dataset_to_hub strict debug",
            LOADING,
        ),
        "dataset_prepared_path": if_streamed(to_path("data.cache_dir")),
        **each("shuffle_merged_datasets", unneeded("rows are always shuffled, by seed")),
        **each(
            "dataset_exact_deduplication curriculum_sampling",
            missing("rows are taken as they are, in an order by seed"),
        ),
        **each("loss_watchdog_threshold loss_watchdog_patience", unneeded("a run ends when the loss is not finite")),
        **each("batch_size auto_find_batch_size", missing("train.global_batch_size is calculated from other keys")),
        **each("bfloat16 float16 torch_dtype", missing("model.dtype says what frozen weights are kept in")),
        "wandb_project": to("wandb.project", text),
        "wandb_entity": to("wandb.entity", text),
        **each("wandb_name wandb_run_name", to("wandb.name", text)),
        "wandb_mode": to("wandb.mode", text),
        "wandb_log_model": Rule(_wandb_model, ("wandb.log_checkpoints", "wandb.log_final")),
        **each("wandb_run_id", unneeded("a resumed run goes on as the same one")),
        **each(
            "wandb_watch use_wandb use_tensorboard use_mlflow use_comet use_otel_metrics",
            missing("metrics are in metrics.jsonl"),
        ),
        **each("otel_metrics_host otel_metrics_port", missing("metrics are in metrics.jsonl")),
        **each(
            "use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace "
            "swanlab_log_model swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer",
            missing("of trackers, there is Weights & Biases"),
        ),
        **each(
            "trackio_project_name trackio_run_name trackio_space_id", missing("of trackers, there is Weights & Biases")
        ),
        "do_causal_lm_eval": to("eval.generate", switch),
        "eval_causal_lm_metrics": only_if(
            lambda theirs: theirs.on("do_causal_lm_eval"), Rule(_metrics, ("eval.metrics",)), "answers are not compared"
        ),
        "eval_max_new_tokens": to("eval.max_new_tokens", count),
        **each("eval_table_size do_bench_eval", missing("eval.generate and eval.metrics compare answers")),
    },
)
