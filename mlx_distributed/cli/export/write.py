"""A trained model written as a folder: fused, dequantised, cast, as GGUF, with a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_distributed.cli.export.card import render_card
from mlx_distributed.cli.export.facts import public_name, read_facts
from mlx_distributed.cli.export.source import Source
from mlx_distributed.errors import ConfigError
from mlx_distributed.models.export import adapters, check_loads, check_whole, fuse, take
from mlx_distributed.models.gguf import GGUF_DTYPES, describe_gguf, write_gguf
from mlx_distributed.models.precision import cast
from mlx_distributed.models.save import write_adapter, write_model, written_aside
from mlx_distributed.models.tensor_file import Arriving
from mlx_distributed.models.upstream import dequantize_model

_BESIDE_BYTES = 64 << 20
"""Room for tokenizer, configuration and card."""


@dataclass(frozen=True)
class Wish:
    """What is to be done to the weights."""

    adapter: bool = False
    """Leave the adapters apart from the model below them."""
    dequantize: bool = False
    dtype: str | None = None
    gguf: str | None = None


def write(source: Source, wish: Wish, output: Path, name: str) -> list[str]:
    """Write `output` anew; the model in `source` is used up. Returns what was done, for people.

    Raises:
        ConfigError: it cannot be done, or there is no room; nothing has been written then.
        CheckpointError: it failed while it was written; an older `output` is kept.
    """
    if wish.adapter:
        return _write_adapter(source, output, name)
    model, config = source.model, dict(source.architecture)
    changes = _change(source, wish, config)
    parameters = dict(tree_flatten(model.parameters()))
    metadata = None
    num_bytes = sum(array.nbytes for array in parameters.values())
    if wish.gguf is not None:
        metadata = describe_gguf(parameters, config, source.tokenizer, wish.gguf)
        num_bytes += sum(array.size for array in parameters.values()) * GGUF_DTYPES[wish.gguf].size
    _check_room(output, num_bytes)
    del parameters
    with written_aside(output, "export again") as aside:
        write_model(aside, model, take(model), source.tokenizer, config, source.origin)
        if wish.gguf is not None and metadata is not None:
            write_gguf(aside / f"model-{wish.gguf}.gguf", aside, config, metadata, wish.gguf)
        _write_card(aside, source, name, changes, adapter=False)
        check_loads(aside, trust_remote_code=source.origin.trust_remote_code)
    return changes


def _change(source: Source, wish: Wish, config: dict[str, Any]) -> list[str]:
    """Change the model and its configuration in place."""
    changes = []
    quantization = config.get("quantization")
    bits = f" to {quantization['bits']} bits" if isinstance(quantization, dict) and "bits" in quantization else ""
    if source.adapter is not None:
        num_rounded = fuse(source.model, requantize=not wish.dequantize)
        changes.append("The adapters are fused into the weights.")
        if num_rounded:
            changes.append(
                f"The sum was rounded{bits} again in {num_rounded} layers, which loses some of what the adapters have "
                "learned."
            )
    if wish.dequantize:
        if quantization is None:
            raise ConfigError("--dequantize: the model is not quantised; leave it out")
        dequantize_model(source.model)
        config.pop("quantization")
        config.pop("quantization_config", None)
        changes.append(f"The weights were quantised{bits}, and are dequantised.")
    if wish.dtype is not None:
        model = source.model
        model.update(cast(model, model.parameters(), getattr(mx, wish.dtype)))
        changes.append(f"They are cast to {wish.dtype}.")
    return changes


def _write_adapter(source: Source, output: Path, name: str) -> list[str]:
    if source.adapter is None:
        raise ConfigError(f"--adapter: {source.title} has no adapters, all of it was trained; leave --adapter out")
    arrays = adapters(source.model)
    _check_room(output, sum(array.nbytes for array in arrays.values()))
    with written_aside(output, "export again") as aside:
        write_adapter(aside, Arriving(arrays, arrays.values()), _public(source.adapter))
        _write_card(aside, source, name, [], adapter=True)
        check_whole(aside)
    return []


def _public(description: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json without local paths; of the model below, the name is left."""
    kept = ("trained_on", "fine_tune_type", "num_layers", "lora_parameters", "revision")
    model = {"model": public_name(description["model"])}
    return model | {key: description[key] for key in kept if key in description}


def _check_room(output: Path, num_bytes: int) -> None:
    folder = next(path for path in output.resolve().parents if path.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes + _BESIDE_BYTES > free_bytes:
        raise ConfigError(
            f"--output {output}: the export needs {(num_bytes + _BESIDE_BYTES) / 1e9:.1f} GB, and {folder} has "
            f"{free_bytes / 1e9:.1f} GB free; make room, or give a folder on another disk"
        )


def _write_card(folder: Path, source: Source, name: str, changes: list[str], *, adapter: bool) -> None:
    meta = source.checkpoint.meta if source.checkpoint else None
    facts = None if source.run is None else read_facts(source.run, meta)
    (folder / "README.md").write_text(
        render_card(name, source.below, facts, changes, adapter=adapter), encoding="utf-8"
    )
