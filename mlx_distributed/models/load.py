"""Load a model and its tokenizer from a local folder or from the Hugging Face Hub, through mlx-lm."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models.precision import cast
from mlx_distributed.models.quantize import evaluate, quantize
from mlx_distributed.models.upstream import DEFAULT_ALLOW_PATTERNS, TokenizerWrapper, load_folder, load_tokenizer

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WEIGHTS = "model*.safetensors"
_FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)
"""What mlx-lm and transformers raise at files that they cannot read."""


def load(model: ModelConfig, *, lazy: bool = False) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """The model in evaluation mode, its tokenizer, and its architecture as in config.json.

    All arrays are evaluated, since `mx.load` is lazy: afterwards the files may be replaced, and any thread may use the
    model. Nothing is asked of the network for a local folder.

    Args:
        model: what to load.
        lazy: read names and shapes only; weights are read when they are evaluated, as `cut` does for its own.

    Raises:
        ConfigError: no such folder or Hub model, a missing or damaged file, an architecture unknown to mlx-lm, or one
            that cannot be quantised.
    """
    folder = locate(model)
    _check_files(model, folder)
    try:
        loaded, tokenizer, config = load_folder(
            str(folder),
            tokenizer_config={"trust_remote_code": model.trust_remote_code},
            lazy=True,
            return_config=True,
            trust_remote_code=model.trust_remote_code,
        )
        if model.dtype is not None:
            loaded.update(cast(loaded, loaded.parameters(), getattr(mx, model.dtype)))
        if model.quantize.bits is not None:
            config = quantize(loaded, config, model.quantize)
        if not lazy:
            evaluate(loaded)
            mx.eval(loaded.state)
    except _FAILURES as error:
        raise ConfigError(f"model.path={model.path} cannot be loaded by mlx-lm: {in_short(error)}") from error
    _check_tokenizer(model, tokenizer)
    return loaded, tokenizer, config


def read_tokenizer(model: ModelConfig) -> TokenizerWrapper:
    """The tokenizer of `load`, without the model: no weights are read, nor downloaded.

    Raises:
        ConfigError: no such folder or Hub model, or no tokenizer that transformers can load.
    """
    folder = locate(model, patterns=[pattern for pattern in DEFAULT_ALLOW_PATTERNS if pattern != WEIGHTS])
    try:
        tokenizer = load_tokenizer(folder, {"trust_remote_code": model.trust_remote_code})
    except _FAILURES as error:
        raise ConfigError(f"model.path={model.path} has no tokenizer that can be loaded: {in_short(error)}") from error
    _check_tokenizer(model, tokenizer)
    return tokenizer


def locate(
    model: ModelConfig, *, local_files_only: bool = False, patterns: Sequence[str] = DEFAULT_ALLOW_PATTERNS
) -> Path:
    """The folder with the files of the model: `model.path` itself, or the snapshot of that Hub model (downloaded).

    Args:
        model: what to find.
        local_files_only: ask nothing of the network.
        patterns: names of the files that are needed.

    Raises:
        ConfigError: there is neither such a folder nor such a Hub model, or the Hub cannot be reached.
    """
    assert model.path is not None
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"model.path={model.path} is a file; give the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(model.path):
        raise ConfigError(
            f"model.path={model.path} does not exist; give a folder with config.json, model*.safetensors and the "
            "tokenizer files, or a Hugging Face name such as mlx-community/Qwen3-0.6B-bf16"
        )
    try:
        snapshot = snapshot_download(
            model.path,
            revision=model.revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(
            f"model.path={model.path} is no local folder, and as a Hugging Face name it cannot be had; check the name, "
            f"model.revision and the network, or download the model once and give its folder ({in_short(error)})"
        ) from error
    return Path(snapshot)


def _check_files(model: ModelConfig, folder: Path) -> None:
    """Say what is missing in words: mlx-lm would raise FileNotFoundError or KeyError."""
    config_file = folder / "config.json"
    if (folder / "adapter_config.json").exists() and not config_file.exists():
        raise ConfigError(f"model.path={model.path} holds an adapter; give the model that it was trained on")
    if not config_file.exists():
        raise ConfigError(f"model.path={model.path} has no config.json, so it is not a model folder")
    if not any(folder.glob(WEIGHTS)):
        raise ConfigError(
            f"model.path={model.path} has no weights: mlx-lm reads files named model*.safetensors; "
            "convert other formats with `mlx_lm.convert`"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{config_file} is not JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(f"{config_file} does not say `model_type`, which names the architecture, such as qwen3")


def _check_tokenizer(model: ModelConfig, tokenizer: TokenizerWrapper) -> None:
    """Where the files of a tokenizer are missing, transformers (5.23) makes one of some classes that reads nothing."""
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"model.path={model.path} has no tokenizer: without a tokenizer.json (or tokenizer.model) no text can be "
            "read; copy it from the model that this one was made of"
        )


def in_short(error: Exception) -> str:
    """One paragraph of what can be a list of all weights."""
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
