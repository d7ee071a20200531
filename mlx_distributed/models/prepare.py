"""Make a loaded model trainable: freeze it and add LoRA or DoRA layers, or unfreeze all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_distributed.config.schema import LoraConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models.upstream import QuantizedSwitchLinear, SwitchLinear, linear_to_lora_layers

Method = Literal["lora", "dora", "full"]
DEFAULT_ALPHA = 16.0
_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)


_CHECKSUM_WORDS = 1 << 24  # at a time, to need little memory


class Absent:
    """Mixed into the class of a transformer block that another pipeline stage holds."""


def layers(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, first to last; of a pipeline stage those that it holds.

    Raises:
        ConfigError: the architecture does not list them.
    """
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, list) or not blocks:
        raise ConfigError(
            f"the architecture {getattr(model, 'model_type', type(model).__name__)} does not list its layers, "
            "which fine-tuning needs; use for example a llama, qwen or mistral model"
        )
    return [block for block in blocks if not isinstance(block, Absent)]


def prepare(model: nn.Module, method: Method, lora: LoraConfig, seed: int, *, lazy: bool = False) -> None:
    """Decide, once per model, what is trained: it becomes float32, and the model is put into training mode.

    "lora" and "dora" adapt linear layers inside the transformer blocks (mlx-lm's layers; the same seed gives the same
    weights, `mx.random` is seeded anew); "full" trains every parameter, embeddings and head too. With `lazy` nothing is
    evaluated, and a stage cut from the model gets the adapters that the whole model would have.

    Raises:
        ConfigError: a name in `lora.target_modules` matches nothing, `lora.num_layers` does not fit, or the layers of
            the model cannot be trained this way.
    """
    if method == "full":
        _refuse_packed_weights(model)
        model.unfreeze()
    else:
        num_layers, keys = num_lora_layers(model, lora), _lora_keys(model, method, lora)
        parameters = {"rank": lora.rank, "scale": lora.effective_scale, "dropout": lora.dropout, "keys": keys}
        model.freeze()
        mx.random.seed(seed)
        linear_to_lora_layers(model, num_layers, parameters, use_dora=method == "dora")
    model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    model.train()
    if not lazy:
        mx.eval(model.state)


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters by dotted name, in the order of the names."""
    return dict(sorted(dict(tree_flatten(model.trainable_parameters())).items()))


def fingerprint(model: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the architecture, what is trained, and a checksum of every weight, frozen ones too.

    Two workers train the same model, and two runs can continue each other's checkpoints, only if theirs are equal.
    To be taken before training, while the weights are those that were loaded.
    """
    return join_fingerprints([weigh(model)], config)


def weigh(model: nn.Module) -> dict[str, Any]:
    """What the fingerprint of a model takes from it, or from one of its pipeline stages; can be sent as JSON."""
    parameters = [[name, list(array.shape), str(array.dtype)] for name, array in trainable(model).items()]
    weights = {name: _checksum(array) for name, array in dict(tree_flatten(model.parameters())).items()}
    return {"trainable": parameters, "weights": weights}


def join_fingerprints(stages: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """The `fingerprint` of a whole model from what its stages weigh; tied embeddings, which two hold, count once."""
    trained = {name: [name, *kind] for stage in stages for name, *kind in stage["trainable"]}
    parameters = [trained[name] for name in sorted(trained)]
    weights = {name: checksum for stage in stages for name, checksum in stage["weights"].items()}
    text = json.dumps({"architecture": dict(config), "trainable": parameters, "weights": weights}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(array: mx.array) -> int:
    """Sum of the words of an array, each times an odd number of its place, modulo 2**32.

    Integers, so that the order of adding does not matter and MLX can do it at the speed of memory, where a SHA-256 of a
    large model takes minutes. It tells weights apart by mistake, not by malice.
    """
    word = {1: mx.uint8, 2: mx.uint16}.get(array.dtype.size, mx.uint32)
    flat = mx.contiguous(array).reshape(-1).view(word)
    total = 0
    for start in range(0, flat.size, _CHECKSUM_WORDS):
        words = flat[start : start + _CHECKSUM_WORDS].astype(mx.uint32)
        total += int(np.asarray((words * (2 * mx.arange(start, start + words.size, dtype=mx.uint32) + 1)).sum()))
    return total % 2**32


def num_lora_layers(model: nn.Module, lora: LoraConfig) -> int:
    """How many blocks are adapted, counted from the last one.

    Raises:
        ConfigError: `lora.num_layers` is neither -1 nor within the model.
    """
    num_layers = len(layers(model))
    if lora.num_layers == -1:
        return num_layers
    if not 1 <= lora.num_layers <= num_layers:
        raise ConfigError(
            f"lora.num_layers={lora.num_layers} does not fit the {num_layers} layers of the model; "
            f"use 1 to {num_layers}, or -1 for all"
        )
    return lora.num_layers


def _lora_keys(model: nn.Module, method: Method, lora: LoraConfig) -> list[str]:
    """Names, inside a block, of the layers to adapt: those of `lora.target_modules` among the linear ones."""
    linear = [
        (name, module)
        for block in layers(model)[-num_lora_layers(model, lora) :]
        for name, module in block.named_modules()
        if isinstance(module, _LINEAR) or hasattr(module, "to_lora")
    ]
    names = sorted({name for name, _ in linear})
    if not names:
        raise ConfigError(f"method={method} needs linear layers that mlx-lm can adapt; there are none, so use full")
    if lora.target_modules != "all-linear":
        if wrong := [target for target in lora.target_modules if not any(_matches(name, target) for name in names)]:
            raise ConfigError(
                f"lora.target_modules has {', '.join(wrong)}, but a linear layer of this model is one of "
                f"{', '.join(names)}; the last part of a name is enough"
            )
        names = [name for name in names if any(_matches(name, target) for target in lora.target_modules)]
    refused = {name for name, module in linear if name in names and not _takes_dora(module)}
    if method == "dora" and refused:
        raise ConfigError(
            f"method=dora cannot adapt {', '.join(sorted(refused))}: mlx-lm has it for plain linear layers, also "
            "quantised to 2, 4 or 8 bits, not for experts; use lora, or leave them out of lora.target_modules"
        )
    return names


def _matches(name: str, target: str) -> bool:
    return target in (name, name.rpartition(".")[2])


def _takes_dora(module: nn.Module) -> bool:
    """mlx-lm's DoRALinear computes the width of a quantised layer as if whole values were packed into 32 bits."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.QuantizedLinear) and 32 % module.bits == 0)


def _refuse_packed_weights(model: nn.Module) -> None:
    for name, array in dict(tree_flatten(model.parameters())).items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ConfigError(
                f"method=full cannot train quantised weights ({name} is {str(array.dtype).rpartition('.')[2]}); "
                "use lora, or a model that is not quantised"
            )
