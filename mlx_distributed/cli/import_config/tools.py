"""The programs that are known, and which of them a file is for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mlx_distributed.cli.import_config.axolotl import AXOLOTL
from mlx_distributed.cli.import_config.llamafactory import LLAMAFACTORY
from mlx_distributed.cli.import_config.llamafactory_v1 import LLAMAFACTORY_V1
from mlx_distributed.cli.import_config.mlx_lm import MLX_LM
from mlx_distributed.cli.import_config.rules import Tool
from mlx_distributed.config.checks import listed
from mlx_distributed.errors import ConfigError

TOOLS = {tool.name: tool for tool in (AXOLOTL, LLAMAFACTORY, LLAMAFACTORY_V1, MLX_LM)}


def detect(path: Path, keys: Collection[str]) -> Tool:
    """The program that knows most of the `keys` at the top of the file at `path`.

    Raises:
        ConfigError: none knows one, or two know as many.
    """
    known = {name: {key.partition(".")[0] for key in tool.rules}.intersection(keys) for name, tool in TOOLS.items()}
    first, second = sorted(known, key=lambda name: len(known[name]), reverse=True)[:2]
    if len(known[first]) == len(known[second]):
        why = f"its keys are as much of {first} as of {second}" if known[first] else "none of its keys is known"
        raise ConfigError(
            f"{path}: {why}; if it configures a training, say of which program with --from {listed([*TOOLS])}"
        )
    return TOOLS[first]
