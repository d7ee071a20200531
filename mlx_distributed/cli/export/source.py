"""What is exported: the finished model of a run, one of its checkpoints, or a model or adapter folder of mlx-lm."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import yaml
from mlx.utils import tree_unflatten

from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.parts import load_tokenizer
from mlx_distributed.comm.base import LocalComm
from mlx_distributed.config import Config, ModelConfig, load_config
from mlx_distributed.config.load import parse_config
from mlx_distributed.errors import CheckpointError, ConfigError
from mlx_distributed.models import load, prepare, trainable
from mlx_distributed.models.export import adapt, check_whole
from mlx_distributed.models.load import in_short
from mlx_distributed.models.save import describe_adapter
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.train.checkpoint import Checkpoint, best, newest_valid, open_checkpoint

ADAPTER_CONFIG = "adapter_config.json"


_OF_THE_MODEL = ("model", "method", "lora", "precision", "seed")
"""In a configuration, what says what the model is."""


@dataclass(frozen=True)
class Source:
    """A trained model, of which no more is evaluated than the adapters of a checkpoint."""

    title: str
    """For people."""
    model: nn.Module
    """With its adapters, where it has any."""
    tokenizer: TokenizerWrapper
    architecture: dict[str, Any]
    """As in config.json."""
    origin: ModelConfig
    """Where the files beside the weights are; with adapters, the model below them."""
    below: ModelConfig | None
    """What was trained; None where that is not known."""
    adapter: Mapping[str, Any] | None
    """Contents of adapter_config.json; None where all of the model was trained."""
    run: Path | None
    """The folder of the run, if it is known."""
    checkpoint: Checkpoint | None = None


def place(path: Path, which: str | None) -> Path:
    """The folder of the trained model that a person means.

    Args:
        path: of a run, of a checkpoint, or of a model or an adapter.
        which: checkpoint of a run, `last` or `best`; None takes its finished model.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: `path` is something else, or the run has no finished model.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give the output_dir of a run, a checkpoint, or a model folder")
    if not _is_run(path):
        if which is not None:
            raise ConfigError(f"--checkpoint {which}: {path} holds no run; give its output_dir, or leave it out")
        if _is_model(path) or path.resolve().parent.name == "checkpoints":
            return path
        raise ConfigError(
            f"{path} holds no run, no checkpoint of one and no model; give an output_dir (with config.yaml and "
            "run.json), a folder in its checkpoints/, or a model or adapter folder of mlx-lm"
        )
    if which is None:
        if not (path / "final").is_dir():
            raise ConfigError(
                f"{path} has no final/, as the run has not come to its end; give --checkpoint last for what it has "
                "saved, or go on with mlx-train --resume"
            )
        return path / "final"
    folder = path / "checkpoints"
    metric = _config(path).checkpoint.metric_for_best
    found = newest_valid(folder, _notice) if which == "last" else best(folder, _notice, metric)
    if found is None:
        measured = f" and has {metric}" if which == "best" else ""
        raise CheckpointError(f"no checkpoint in {folder} is whole{measured}; go on with the run until it has saved")
    return found.folder


def open_source(folder: Path) -> Source:
    """The model in a folder from `place`.

    Raises:
        CheckpointError: it is not whole.
        ConfigError: it, or the model below it, cannot be loaded.
    """
    parent = folder.resolve().parent
    if parent.name == "checkpoints" and not _is_model(folder):
        return _open_checkpoint(folder, parent.parent)
    check_whole(folder)
    run = parent if folder.name == "final" and _is_run(parent) else None
    if not (folder / ADAPTER_CONFIG).exists():
        below = None if run is None else _config(run).model
        origin = ModelConfig(path=str(folder), trust_remote_code=below is not None and below.trust_remote_code)
        model, tokenizer, architecture = load(origin, lazy=True)
        return Source(f"the model in {folder}", model, tokenizer, architecture, origin, below, None, run)
    description = _read_description(folder / ADAPTER_CONFIG)
    base = Path(description["model"]).expanduser()
    path = str(base.resolve()) if base.is_dir() else description["model"]
    config = Config(ModelConfig(path=path, revision=description.get("revision")))
    if run is not None:
        config = _config(run)
    model, tokenizer, architecture = _load_base(config)
    adapt(model, folder)
    title = f"the adapter in {folder}"
    return Source(title, model, tokenizer, architecture, config.model, config.model, description | {"model": path}, run)


def _open_checkpoint(folder: Path, run: Path) -> Source:
    checkpoint = open_checkpoint(folder)
    if not _is_run(run):
        raise ConfigError(f"{folder} has lost its run: {run} has no config.yaml and run.json, which say what it is of")
    config = _config(run)
    if config.model.scratch is None:
        model, tokenizer, architecture = _load_base(config)
        prepare(model, config.method, config.lora, config.seed, lazy=True)
    else:  # Its tokenizer is nowhere but in the data.
        loaded = load_all(load_config(run / "config.yaml"), LocalComm())
        checkpoint.meta.check_facts(loaded.facts)
        model, tokenizer, architecture = loaded.model, loaded.tokenizer, dict(loaded.architecture)
    description = None if config.method == "full" else describe_adapter(model, config.model, config.method, config.lora)
    parameters = checkpoint.lazy_parameters()
    due = {name: array.shape for name, array in trainable(model).items()}
    if {name: array.shape for name, array in parameters.items()} != due:
        raise ConfigError(f"{folder} does not fit the model of {run / 'config.yaml'}: other parameters are trained")
    model.update(tree_unflatten(list(parameters.items())))
    title = f"the checkpoint {folder}"
    below = config.model
    return Source(title, model, tokenizer, architecture, below, below, description, run, checkpoint)


def _load_base(config: Config) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """The model before it was trained, with the chat template that it was trained with."""
    model, tokenizer, architecture = load(config.base, lazy=True)
    if config.data.chat_template is not None:
        tokenizer = load_tokenizer(config, None)
    return model, tokenizer, architecture


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "run.json").is_file()


def _config(run: Path) -> Config:
    """Of a run, as far as it says what the model is: its data may be gone by now."""
    file = run / "config.yaml"
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
        data = {"train": "not/needed", "chat_template": plain["data"]["chat_template"]}
        plain = {name: plain[name] for name in _OF_THE_MODEL} | {"data": data}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is damaged ({in_short(error)}); copy the folder of the run anew") from error
    config = parse_config(yaml.safe_dump(plain), file)
    return replace(config, output_dir=run)


def _read_description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(description["model"], str):
            raise TypeError("its `model` is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} does not say which `model` the adapter is for ({error}); write the folder or the Hugging Face "
            "name of that model there"
        ) from error
    return description


def _notice(message: str) -> None:
    print(message, file=sys.stderr)
