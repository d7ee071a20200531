"""Build a new model from an architecture, as it would stand in a config.json, with random weights."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pkgutil import iter_modules
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.upstream import ARCHITECTURES_FOLDER, MODEL_REMAPPING, TokenizerWrapper


def build_scratch(
    arch: Mapping[str, Any], tokenizer: TokenizerWrapper, seed: int, *, lazy: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights and its complete architecture, to be saved as config.json.

    `vocab_size` becomes the true size of the tokenizer. Keys that the architecture needs and `arch` leaves out are
    filled in where one value is safe (see `_defaults`). The weights are MLX's own initial ones, the same for the same
    seed; `mx.random` is seeded anew. With `lazy` they are drawn when they are evaluated, and are the same numbers. A
    tied model starts within about 0.7 of the loss of guessing, ln(vocab_size).

    Raises:
        ConfigError: unknown architecture, key that it does not know, missing key, or sizes that do not fit together.
    """
    model_class, args_class = _architecture(arch.get("model_type"))
    model_type = arch["model_type"]
    known = inspect.signature(args_class).parameters
    if unknown := [key for key in arch if key not in known]:
        raise ConfigError(
            f"model.scratch has keys that mlx-lm's {model_type} does not read: "
            + ", ".join(key + _did_you_mean(key, list(known)) for key in unknown)
        )
    unset = {key for key, field in known.items() if field.default in (field.empty, None)}
    config = {key: value for key, value in _defaults(arch).items() if key in unset} | dict(arch)
    config["vocab_size"] = len(tokenizer)
    missing = [key for key, field in known.items() if field.default is field.empty and key not in config]
    if missing:
        raise ConfigError(f"model.scratch lacks {', '.join(missing)}, which mlx-lm's {model_type} needs")

    mx.random.seed(seed)
    try:
        model = model_class(args_class.from_dict(config))
        if not lazy:
            mx.eval(model.state)
        model(mx.zeros((1, 1), mx.int32))  # lazy, so it costs nothing: only the shapes are checked
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"model.scratch does not make a {model_type} model: {reason}") from error
    model.eval()
    return model, config | {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def _architecture(model_type: object) -> tuple[Any, Any]:
    """The `Model` and `ModelArgs` classes of mlx-lm's file for this model type."""
    names = [module.name for module in iter_modules([ARCHITECTURES_FOLDER])] + list(MODEL_REMAPPING)
    if model_type not in names:
        raise ConfigError(
            f"model.scratch.model_type={model_type!r} is not an architecture of mlx-lm"
            + _did_you_mean(str(model_type), names, otherwise="; use for example qwen3 or llama")
        )
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(str(model_type), model_type)}")
    if not hasattr(module, "ModelArgs"):
        raise ConfigError(f"model.scratch.model_type={model_type!r} is not a model; use for example qwen3 or llama")
    return module.Model, module.ModelArgs


def _defaults(arch: Mapping[str, Any]) -> dict[str, Any]:
    """What the dense decoders (llama, qwen2, qwen3, ...) leave without a default."""
    defaults: dict[str, Any] = {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    hidden, heads = arch.get("hidden_size"), arch.get("num_attention_heads")
    if isinstance(heads, int) and heads > 0:
        defaults["num_key_value_heads"] = heads
        if isinstance(hidden, int) and hidden % heads == 0:
            defaults["head_dim"] = hidden // heads
    return defaults


def _did_you_mean(name: str, names: list[str], otherwise: str = "") -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else otherwise
