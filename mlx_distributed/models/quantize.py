"""Quantise a model when it is loaded, for adapters on a base of few bits (QLoRA).

Source:
    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"; which layers, and how, is as in mlx-lm's
    `convert`, so the weights are those of a model that it has made.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.config.schema import QuantizeConfig
from mlx_distributed.errors import ConfigError


def quantize(model: nn.Module, architecture: dict[str, Any], settings: QuantizeConfig) -> dict[str, Any]:
    """Replace the linear layers and embeddings of a model, lazily; evaluate it layer by layer with `evaluate`.

    Args:
        model: is changed.
        architecture: as in its config.json.
        settings: with `bits`.

    Returns:
        The architecture with what was done.

    Raises:
        ConfigError: the model is quantised already, or no layer can be.
    """
    bits, group_size = settings.bits, settings.group_size
    assert bits is not None
    asked = f"model.quantize.bits={bits}"
    if "quantization" in architecture:
        raise ConfigError(f"{asked}: the model is stored quantised already; leave model.quantize out to train on that")
    done: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    wanted = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    num_layers = 0

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        nonlocal num_layers
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        how: bool | dict[str, Any] = wanted(path, module)
        num_layers += bool(how)
        if isinstance(how, dict):
            done[path] = how
        return how

    nn.quantize(model, group_size, bits, class_predicate=predicate)
    if not num_layers:
        raise ConfigError(
            f"{asked}: no weight has rows that are a multiple of model.quantize.group_size={group_size}; "
            "use a smaller one, or leave model.quantize out"
        )
    return architecture | {"quantization": done}


def evaluate(model: nn.Module) -> None:
    """Read and compute what a lazy model holds, module by module: the weights of one at a time are there whole."""
    for module in model.modules():
        if not module.children():
            mx.eval(module.parameters())
