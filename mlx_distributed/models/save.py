"""Write the finished model where mlx-lm can load it: a whole model folder, or an adapter folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models.load import locate
from mlx_distributed.models.prepare import Method, layers, num_lora_layers, trainable
from mlx_distributed.models.tensor_file import Arriving, write_tensors
from mlx_distributed.models.upstream import TokenizerWrapper, get_total_parameters, make_shards, save_config


def save_final(
    folder: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    *,
    source: ModelConfig,
    method: Method,
    lora: LoraConfig,
    trained: Iterable[mx.array] | None = None,
) -> None:
    """Replace `folder` by the finished model.

    "full" writes what `mlx_lm.load(folder)` needs; "lora" and "dora" write what
    `mlx_lm.load(source.path, adapter_path=folder)` needs. Everything is written aside and renamed into place.

    Args:
        config: architecture, as `load` or `build_scratch` gave it.
        source: where the model came from.
        trained: what is trained, in the order of the names, one at a time; `model` need not be evaluated then, and has
            the rest, names, shapes and dtypes. None: as `model` has it.

    Raises:
        CheckpointError: the files cannot be written, for example because the disk is full; the old `folder` is kept.
    """
    own = trainable(model)
    given = iter(own.values() if trained is None else trained)
    with written_aside(folder, "resume the run") as aside:
        if method == "full":
            whole = dict(sorted(dict(tree_flatten(model.parameters())).items()))
            arrays = (next(given) if name in own else array for name, array in whole.items())
            write_model(aside, model, Arriving(whole, arrays), tokenizer, config, source)
        else:
            write_adapter(aside, Arriving(own, given), describe_adapter(model, source, method, lora))


def write_model(
    folder: Path,
    model: nn.Module,
    weights: Arriving,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    source: ModelConfig,
) -> None:
    """Fill an empty folder with what `mlx_lm.load` needs; see `save_final`. Of `model` only shapes are looked at."""
    _write_weights(folder, weights, get_total_parameters(model))
    save_config(dict(config), folder / "config.json")
    tokenizer.save_pretrained(folder)
    if source.path is not None:  # generation settings, and the code of a model that brings its own
        origin = locate(source, local_files_only=True)
        for file in [*origin.glob("generation_config.json"), *origin.glob("*.py")]:
            shutil.copy(file, folder)


def _write_weights(folder: Path, weights: Arriving, num_parameters: int) -> None:
    """The files that mlx-lm makes of weights, with their index."""
    arrays, shards = iter(weights.arrays), make_shards(dict(weights.like))
    file_of: dict[str, str] = {}
    for number, like in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            write_tensors(file, Arriving(like, islice(arrays, len(like))))
        file_of |= dict.fromkeys(like, name)
    total_size = sum(array.nbytes for array in weights.like.values())
    metadata = {"total_size": total_size, "total_parameters": num_parameters}
    text = json.dumps({"metadata": metadata, "weight_map": file_of}, indent=4)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def describe_adapter(model: nn.Module, source: ModelConfig, method: Method, lora: LoraConfig) -> dict[str, Any]:
    """The adapter_config.json of a model that `prepare` has given adapters."""
    assert source.path is not None, "an adapter needs a stored model below it"
    keys = {name for block in layers(model) for name, module in block.named_modules() if "lora_a" in module}
    base = Path(source.path).expanduser()
    quantized = {} if source.quantize.bits is None else {"quantization": asdict(source.quantize)}  # of what is below it
    return {
        "model": str(base.resolve()) if base.exists() else source.path,
        "revision": source.revision,
        "fine_tune_type": method,
        "num_layers": num_lora_layers(model, lora),
        "lora_parameters": {
            "rank": lora.rank,
            "scale": lora.effective_scale,
            "dropout": lora.dropout,
            "keys": sorted(keys),
        },
        **quantized,
    }


def write_adapter(folder: Path, adapters: Arriving, description: Mapping[str, Any]) -> None:
    """Fill an empty folder with what `mlx_lm.load` needs beside the model that was adapted."""
    text = json.dumps(description, indent=4) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with (folder / "adapters.safetensors").open("wb") as file:
        write_tensors(file, adapters)


@contextmanager
def written_aside(folder: Path, then: str) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end.

    Args:
        folder: that is replaced, if it is there.
        then: what a person does once there is room for it.

    Raises:
        CheckpointError: it cannot be written; the old `folder` is kept.
    """
    aside, replaced = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "replaced"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        aside.rename(folder)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where Python would raise OSError
        raise CheckpointError(
            f"{folder} could not be written ({error}); free some space or check the rights, then {then}"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
