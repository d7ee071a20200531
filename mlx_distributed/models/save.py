"""Write the finished model where mlx-lm can load it: a whole model folder, or an adapter folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models.load import locate
from mlx_distributed.models.prepare import Method, layers, num_lora_layers, trainable
from mlx_distributed.models.upstream import TokenizerWrapper, save_config, save_model


def save_final(
    folder: Path,
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    config: Mapping[str, Any],
    *,
    source: ModelConfig,
    method: Method,
    lora: LoraConfig,
) -> None:
    """Replace `folder` by the finished model.

    "full" writes what `mlx_lm.load(folder)` needs; "lora" and "dora" write what
    `mlx_lm.load(source.path, adapter_path=folder)` needs. Everything is written aside and renamed into place.

    Args:
        config: architecture, as `load` or `build_scratch` gave it.
        source: where the model came from.

    Raises:
        CheckpointError: the files cannot be written, for example because the disk is full; the old `folder` is kept.
    """
    with _written_aside(folder) as aside:
        if method == "full":
            _write_model(aside, model, tokenizer, config, source)
        else:
            _write_adapter(aside, model, source, method, lora)


def _write_model(
    folder: Path, model: nn.Module, tokenizer: TokenizerWrapper, config: Mapping[str, Any], source: ModelConfig
) -> None:
    save_model(folder, model)
    save_config(dict(config), folder / "config.json")
    tokenizer.save_pretrained(folder)
    if source.path is not None:  # generation settings, and the code of a model that brings its own
        origin = locate(source, local_files_only=True)
        for file in [*origin.glob("generation_config.json"), *origin.glob("*.py")]:
            shutil.copy(file, folder)


def _write_adapter(folder: Path, model: nn.Module, source: ModelConfig, method: Method, lora: LoraConfig) -> None:
    assert source.path is not None, "an adapter needs a stored model below it"
    keys = {name for block in layers(model) for name, module in block.named_modules() if "lora_a" in module}
    base = Path(source.path).expanduser()
    adapter_config = {
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
    }
    text = json.dumps(adapter_config, indent=4) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    mx.save_safetensors(str(folder / "adapters.safetensors"), trainable(model), metadata={"format": "mlx"})


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end."""
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
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{folder} could not be written ({error}); free some space or check the rights, then resume the run"
        ) from error
    shutil.rmtree(replaced, ignore_errors=True)
