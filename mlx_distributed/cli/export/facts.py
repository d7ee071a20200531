"""What a run has written down about itself, for a model card. None of it is trusted to be what it should be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_distributed.cli.data_report import read_data
from mlx_distributed.cli.report import comparison
from mlx_distributed.train.best import EVAL_LOSS, cost
from mlx_distributed.train.checkpoint import CheckpointMeta

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PRIVATE = ("output_dir", "wandb", "elastic")
"""Sections that are about the machines and people of a run, and not about the model."""


@dataclass(frozen=True)
class Facts:
    """Of a run, as far as they are there."""

    config: Mapping[str, Any]
    """Without what is private, and with names in place of local paths."""
    data: tuple[str, ...]
    """Lines of the data report."""
    figures: tuple[str, ...]
    """Lines of what was measured."""
    versions: Mapping[str, str]


def read_facts(run: Path, meta: CheckpointMeta | None) -> Facts:
    """Read the files of a run.

    Args:
        run: its folder.
        meta: of the checkpoint that is exported; None for the finished model.
    """
    config = _mapping(_parsed(run / "config.yaml"))
    report = read_data(run)
    versions = _mapping(_mapping(_parsed(run / "run.json")).get("versions"))
    return Facts(
        config=_public(config),
        data=tuple(line for line in report.lines() if not line.startswith(" ")) if report else (),
        figures=tuple(_figures(run / "metrics.jsonl", _mapping(config.get("checkpoint")), meta)),
        versions={name: text for name, text in versions.items() if isinstance(text, str)},
    )


def public_name(path: str) -> str:
    """A name on the Hugging Face Hub as it is, and of a path on some machine the last part."""
    return path if is_hub_name(path) else Path(path).name


def is_hub_name(path: str) -> bool:
    """Whether a path of a resolved configuration, where those on this machine are absolute, is a name on the Hub."""
    return _HUB_NAME.fullmatch(path) is not None


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _named(value) for key, value in config.items() if key not in _PRIVATE}


def _named(value: Any) -> Any:
    """The same, but of local paths the last name, and no addresses."""
    if isinstance(value, Mapping):
        return {key: _named(child) for key, child in value.items() if key not in ("listen", "cache_dir")}
    if isinstance(value, list):
        return [_named(child) for child in value]
    local = isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value
    return Path(value).name if local else value


def _figures(file: Path, settings: Mapping[str, Any], meta: CheckpointMeta | None) -> Iterator[str]:
    lines = list(_lines(file))
    trained = [line for line in lines if "train/loss" in line and (meta is None or line["step"] <= meta.step)]
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    if trained:
        num_tokens = sum(line.get("train/num_tokens", 0) for line in trained)
        tokens = f", {num_tokens:,.0f} label tokens" if len(trained) == trained[-1]["step"] else ""
        yield f"trained for {trained[-1]['step']:.0f} steps{tokens}"
        yield f"training loss: {trained[0]['train/loss']:.3f} -> {trained[-1]['train/loss']:.3f}"
    before = evaluated[0] if evaluated and evaluated[0]["step"] == 0 else {}
    after = evaluated[-1] if evaluated else {}
    if meta is not None:
        after = dict(meta.metrics)
    elif settings.get("final") == "best" and evaluated:
        metric = str(settings.get("metric_for_best", EVAL_LOSS))
        after = min(evaluated, key=lambda line: cost(metric, line.get(metric)))
    yield from comparison({} if after.get("step") == 0 else before, after)


def _lines(file: Path) -> Iterator[dict[str, float]]:
    """Of metrics.jsonl, the numbers."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        numbers = {name: value for name, value in _mapping(record).items() if _is_number(value)}
        if "step" in numbers:
            yield numbers


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63  # type: ignore[arg-type]


def _parsed(file: Path) -> object:
    """YAML or JSON; None where it is neither, or has aliases, which could make it as long as one likes."""
    try:
        text = file.read_text(encoding="utf-8")
        aliased = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
        return None if aliased else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    return {key: child for key, child in value.items() if isinstance(key, str)} if isinstance(value, Mapping) else {}
