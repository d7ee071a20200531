"""LLaMA-Factory. Keys and defaults as of its 0.9.5 (`src/llamafactory/hparams`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_distributed.cli.import_config import registry
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
    mapped,
    missing,
    names,
    number,
    only_if,
    refuse,
    switch,
    text,
    to,
    to_path,
    unneeded,
)
from mlx_distributed.cli.import_config.trainer import (
    KERNELS,
    LAYERS,
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
    trackers,
)

PREFERENCES = refuse("trains on preferences or rewards, not on answers")
MULTIMODAL = refuse("of a model that sees or hears; text alone is trained on here")
PART = refuse("trains another part of the model: here it is adapters of linear layers, or everything")
OTHER_JOB = refuse("belongs to another job than training")
DETAIL = missing("says more about a feature that is not here")


def _adapted(theirs: Theirs) -> bool:
    return theirs.get("finetuning_type") == "lora"


def _lora(rule: Rule) -> Rule:
    return only_if(_adapted, rule, "there is no adapter")


def _method(value: Any, place: Place) -> Fate:
    if value not in ("lora", "full"):
        return Fate("refused", "here it is lora, dora or full")
    return mapped({"method": "dora" if value == "lora" and place.theirs.on("use_dora") else value})


def _rank(value: Any, place: Place) -> Fate:
    """Without `lora_alpha`, alpha is twice the rank."""
    rank = count(value)
    if place.theirs.on("lora_alpha"):
        return mapped({"lora.rank": rank})
    scale = {"lora.scale": 2 * rank**0.5} if place.theirs.on("use_rslora") else {"lora.alpha": 2.0 * rank}
    return mapped({"lora.rank": rank, **scale}, "and alpha is twice that, since lora_alpha is not given")


def _datasets(split: str) -> Rule:
    """Names of the registry, as sources of `data.train` or `data.validation`."""

    def decide(value: Any, place: Place) -> Fate:
        found = registry.find(place.theirs)
        ours: dict[str, Any] = {}
        unknown: list[str] = []
        refused: list[str] = []
        for index, name in enumerate(names(value)):
            if found is None:
                entry = registry.Entry({"path": name})
            else:
                entry = registry.entry(name, found[1].get(name), found[0], place.theirs)
            ours |= {f"data.{split}.{index}.{key}": each for key, each in entry.source.items()}
            unknown += entry.unknown
            refused += entry.refused
        if refused:
            return Fate(
                "refused", f"in {registry.FILE}, text alone and answers alone are for here: {', '.join(refused)}", ours
            )
        if found is None:
            return Fate(
                "no counterpart",
                f"there is no {registry.FILE}: put the file of each name, or its name on the hub, as path",
                ours,
            )
        if unknown:
            return Fate("no counterpart", f"in {registry.FILE}: {', '.join(unknown)}", ours)
        return mapped(ours, f"by {registry.FILE}")

    keys = ("path", "format", "split", "subset", "columns", "roles")
    return Rule(decide, tuple(f"data.{split}.*.{key}" for key in keys))


def _stage(value: Any, place: Place) -> Fate:
    if value == "sft":
        return Fate("not needed", "is what is done here")
    return Fate("refused", "here it is sft, training on answers")


def _masked(ours: str) -> Rule:
    def decide(value: Any, place: Place) -> Fate:
        return mapped({"data.train_on": ours}) if switch(value) else Fate("not needed", "switched off")

    return Rule(decide, ("data.train_on",))


def _checkpointing(value: Any, place: Place) -> Fate:
    return mapped({"train.gradient_checkpointing": not switch(value)})


def _packing(value: Any, place: Place) -> Fate:
    packed = any(place.theirs.on(key) and switch(place.theirs.get(key)) for key in ("packing", "neat_packing"))
    words = "rows do not see each other; train.global_batch_size counts rows" if packed else ""
    return mapped({"data.packing": packed}, words)


def _report(value: Any, place: Place) -> Fate:
    return trackers(value, None, "llamafactory")


def _train(value: Any, place: Place) -> Fate:
    if switch(value):
        return Fate("not needed", "mlx-train trains")
    raise Unusable("is false: nothing is trained")


def _implied(theirs: Theirs) -> Mapping[str, Any]:
    # Gradients are checkpointed there unless it is switched off.
    ours: dict[str, Any] = {"data.overlong": "truncate", "train.gradient_checkpointing": True}
    if _adapted(theirs):
        ours["lora.target_modules"] = "all-linear"
    return ours


LLAMAFACTORY = Tool(
    name="llamafactory",
    title="LLaMA-Factory",
    defaults={
        "gradient_accumulation_steps": 1,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "save_steps": 500,
        "seed": 42,
    },
    implied=_implied,
    rules={
        **RULES,
        **batch("per_device_train_batch_size"),
        **same("cutoff_len", count),
        **same("num_train_epochs", number),
        "model_name_or_path": to_path("model.path"),
        "model_revision": to("model.revision", text),
        "stage": Rule(_stage),
        "do_train": Rule(_train),
        "finetuning_type": Rule(_method, ("method",)),
        "use_dora": _lora(to("method", lambda value: "dora" if switch(value) else "lora")),
        "lora_rank": _lora(Rule(_rank, ("lora.rank", "lora.alpha", "lora.scale"))),
        "lora_alpha": _lora(alpha("lora_rank", "use_rslora")),
        "use_rslora": _lora(unneeded("is in lora.scale")),
        **{key: _lora(rule) for key, rule in same("lora_dropout", number).items()},
        "lora_target": _lora(LAYERS),
        "dataset": _datasets("train"),
        "eval_dataset": _datasets("validation"),
        "dataset_dir": unneeded("is where dataset_info.json was looked for"),
        "train_on_prompt": _masked("all"),
        "mask_history": _masked("last"),
        **each("packing neat_packing", Rule(_packing, ("data.packing",))),
        "disable_gradient_checkpointing": Rule(_checkpointing, ("train.gradient_checkpointing",)),
        "pure_bf16": choose("precision", {True: "bf16"}, unneeded("switched off")),
        "predict_with_generate": choose("eval.generate", {True: True, False: False}, unneeded("is neither")),
        "max_new_tokens": to("eval.max_new_tokens", count),
        "report_to": Rule(_report, ("wandb.project",)),
        "template": missing(
            "templates have no names here: the tokenizer's own is used; or set data.chat_template to Jinja"
        ),
        **each(
            "default_system tool_format enable_thinking preserve_thinking", missing("write it into data.chat_template")
        ),
        "max_samples": missing("data sets are read whole; for one of the hub, split can be train[:1000]"),
        **each(
            "mix_strategy interleave_probs", missing("weight of a source is in passes per epoch, not a probability")
        ),
        "buffer_size": if_streamed(to("data.shuffle_buffer", count)),
        **each(
            "overwrite_cache tokenized_path cache_dir media_dir data_shared_file_system preprocessing_batch_size",
            LOADING,
        ),
        **each(
            "overwrite_output_dir",
            unneeded("a run with checkpoints goes on only with --resume; nothing is overwritten"),
        ),
        "plot_loss": unneeded("the loss is in metrics.jsonl"),
        **each("include_num_input_tokens_seen include_effective_tokens_per_second", unneeded("are in metrics.jsonl")),
        "quantization_bit": quantised(None),
        "double_quantization": QUANTISED,
        **each("quantization_method quantization_type quantization_device_map", DETAIL),
        **each(
            "adapter_name_or_path adapter_folder create_new_adapter",
            missing("adapters begin anew; merge them into the model first"),
        ),
        **each("additional_target freeze_trainable_layers freeze_trainable_modules freeze_extra_modules", PART),
        **each("use_llama_pro use_badam", PART),
        **each("badam_mode badam_switch_mode badam_switch_interval badam_verbose badam_start_block", DETAIL),
        **each("oft_rank oft_block_size oft_target module_dropout", DETAIL),
        **each(
            "use_galore use_apollo use_adam_mini use_muon",
            missing("AdamW takes its place, which may need another learning rate"),
        ),
        **each(
            "galore_layerwise galore_target galore_rank galore_scale galore_update_interval galore_proj_type", DETAIL
        ),
        **each(
            "apollo_layerwise apollo_target apollo_rank apollo_scale apollo_scale_type apollo_update_interval", DETAIL
        ),
        **each("loraplus_lr_ratio loraplus_lr_embedding", missing("one rate serves all")),
        **each("pissa_init pissa_iter pissa_convert", missing("adapters begin at zero")),
        **each("use_dft_loss use_asft_loss use_eaft_loss mixture_of_depths shift_attn", OBJECTIVE),
        **each("asft_alpha eaft_alpha pref_beta pref_ftx", DETAIL),
        **each("pref_loss reward_model reward_model_type ref_model kto_chosen_weight kto_rejected_weight", PREFERENCES),
        **each(
            "image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_fps video_maxlen",
            unneeded("rows hold text alone"),
        ),
        **each("freeze_vision_tower freeze_multi_modal_projector", MULTIMODAL),
        "freeze_language_model": PART,
        **each("export_dir infer_backend do_predict", OTHER_JOB),
        **each(
            "export_size export_device export_legacy_format export_quantization_bit export_quantization_dataset", DETAIL
        ),
        **each(
            "add_tokens add_special_tokens new_special_tokens_config init_special_tokens resize_vocab",
            missing("tokens are those of the tokenizer"),
        ),
        **each(
            "enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels upcast_layernorm upcast_lmhead_output "
            "use_fast_tokenizer use_kt kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path",
            KERNELS,
        ),
        **each("rope_scaling", missing("the positions are those of the model")),
        **each(
            "use_mca use_megatron_bridge tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel "
            "expert_model_parallel_size context_parallel_size use_distributed_optimizer overlap_param_gather "
            "overlap_grad_reduce bias_activation_fusion apply_rope_fusion moe_grouped_gemm moe_token_dispatcher_type "
            "recompute_granularity use_packed_sequences export_hf_on_finish fsdp_transformer_layer_cls_to_wrap",
            ONE_PROGRAM,
        ),
        **each(
            "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode",
            missing("of trackers, there is Weights & Biases"),
        ),
        **each("compute_accuracy eval_num_beams", missing("eval.generate and eval.metrics compare answers")),
        **each("eval_on_each_dataset", missing("validation rows are measured together")),
        **each("disable_shuffling", missing("rows are always shuffled, by seed")),
        **each("ignore_pad_token_for_loss", unneeded("padding is never trained on")),
        **each("moe_aux_loss_coef", missing("the loss is that of answers alone")),
    },
)
