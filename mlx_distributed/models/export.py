"""A trained model on its way out: adapters fused, weights dequantised, and taken out of the model one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.errors import CheckpointError, ConfigError
from mlx_distributed.models.load import in_short, load
from mlx_distributed.models.tensor_file import Arriving
from mlx_distributed.models.upstream import load_adapters

_ADAPTER_PARAMETERS = ("lora_a", "lora_b", "m")
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What mlx-lm raises at an adapter folder that it cannot read."""


def adapt(model: nn.Module, folder: Path) -> None:
    """Put the adapters of a folder in mlx-lm's layout on the model that they were trained on; nothing is evaluated.

    Raises:
        ConfigError: they are damaged, or are for another model.
    """
    try:
        load_adapters(model, str(folder))
        given = mx.load(str(folder / "adapters.safetensors"))
    except _FAILURES as error:
        raise ConfigError(f"the adapter in {folder} cannot be put on its model: {in_short(error)}") from error
    assert isinstance(given, dict)
    if missing := sorted(adapters(model).keys() - given.keys()):
        raise ConfigError(f"the adapter in {folder} is not whole: {missing[0]} is missing; copy the folder anew")
    model.eval()


def adapters(model: nn.Module) -> dict[str, mx.array]:
    """The parameters of the adapters on a model, by dotted name, in the order of the names."""
    parameters = dict(tree_flatten(model.parameters()))
    return {name: parameters[name] for name in sorted(parameters) if name.split(".")[-1] in _ADAPTER_PARAMETERS}


def fuse(model: nn.Module, *, requantize: bool) -> int:
    """Add the adapters to the weights that they adapt, as lazily as everything else in the model.

    The sum has the dtype of the weights. In quantised layers it is rounded to their bits again where `requantize` is
    set, and otherwise stays as it is.

    Returns:
        How many layers were rounded so.
    """
    fused = []
    num_rounded = 0
    for name, module in model.named_modules():
        if "lora_a" not in module:
            continue
        base = module["linear" if "linear" in module else "embedding"]
        whole = module.fuse(dequantize=True)
        kind = base.scales if "scales" in base else base.weight
        if mx.issubdtype(kind.dtype, mx.floating):  # DoRA's sum is float32 whatever the weights are
            whole.weight = whole.weight.astype(kind.dtype)
        if "scales" in base and requantize:
            whole = whole.to_quantized(group_size=base.group_size, bits=base.bits, mode=base.mode)
            num_rounded += 1
        fused.append((name, whole))
    model.update_modules(tree_unflatten(fused))
    return num_rounded


def take(model: nn.Module) -> Arriving:
    """Take the parameters out of a model, in the order of their names; it keeps their shapes and dtypes.

    Each is given up once the next one is asked for, so that of a lazy model no more than one layer is in memory.
    """
    arrays = dict(sorted(dict(tree_flatten(model.parameters())).items()))
    model.update(tree_map(lambda array: mx.zeros(array.shape, array.dtype), model.parameters()))
    like = dict(sorted(dict(tree_flatten(model.parameters())).items()))
    return Arriving(like, _give_up(arrays))


def _give_up(arrays: dict[str, mx.array]) -> Iterator[mx.array]:
    for name in list(arrays):
        yield arrays.pop(name)


def check_whole(folder: Path) -> None:
    """Compare the sizes of the weight files in a folder with what their headers say; MLX finds out when it reads them.

    Raises:
        CheckpointError: one is torn, or is no safetensors file.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                num_bytes = int.from_bytes(file.read(8), "little")
                if num_bytes > path.stat().st_size:
                    raise ValueError("its header is cut off")
                header = json.loads(file.read(num_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            due = 8 + num_bytes + max(ends, default=0)
            if path.stat().st_size != due:
                raise ValueError(f"it has {path.stat().st_size} bytes instead of {due}")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path} is not whole: {error}; copy it anew, or take a checkpoint") from error


def check_loads(folder: Path, *, trust_remote_code: bool) -> None:
    """Check that a model folder has what its config.json says: all names and shapes. No weights are read.

    Raises:
        CheckpointError: it has not.
    """
    check_whole(folder)
    try:
        load(ModelConfig(path=str(folder), trust_remote_code=trust_remote_code), lazy=True)
    except ConfigError as error:
        raise CheckpointError(f"what was written does not load again: {error}") from error
