"""Configurations of other programs, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mlx_distributed.cli.import_config.render import to_text
from mlx_distributed.cli.import_config.tools import TOOLS
from mlx_distributed.cli.import_config.translate import Translation, translate
from mlx_distributed.config import Config
from mlx_distributed.config.load import parse_config

START = {
    "axolotl": {"base_model": "org/model", "datasets": [{"path": "org/rows", "type": "chat_template"}]},
    "llamafactory": {"model_name_or_path": "org/model", "dataset": "org/rows"},
    "llamafactory-v1": {"model": "org/model", "train_dataset": "org/rows"},
    "mlx-lm": {"model": "org/model", "data": "org/rows"},
}


def of(name: str, num_devices: int = 1, **values: Any) -> Translation:
    root = yaml.compose(yaml.safe_dump(START[name] | values))
    assert isinstance(root, yaml.MappingNode)
    return translate(root, TOOLS[name], num_devices, Path.cwd(), Path.cwd())


def config(translation: Translation) -> Config:
    """As our loader reads what is written."""
    return parse_config(to_text(translation, "theirs.yml"), Path.cwd() / "our.yaml")


def fate(translation: Translation, key: str) -> tuple[str, str]:
    (found,) = [finding.fate for finding in translation.findings if finding.key == key and not finding.default]
    return found.kind, found.words
