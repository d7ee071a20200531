"""A `Config` in, plain values or YAML out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_distributed.config.nodes import SCALARS, TAG
from mlx_distributed.config.schema import Config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain mappings, lists and scalars, in the order of the schema."""
    plain: dict[str, Any] = _plain(config)
    return plain


def to_yaml(config: Config) -> str:
    """YAML that `load_config` reads back as an equal configuration."""
    return yaml_of(to_dict(config))


def yaml_of(plain: Mapping[str, Any]) -> str:
    """YAML of what `to_dict` gives."""
    text: str = yaml.dump(dict(plain), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def to_inline(value: Any) -> str:
    """A plain value on one line of YAML."""
    line: str = yaml.dump(
        value, Dumper=_Inline, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return line.removesuffix("...\n").removesuffix("\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 would misread and, besides, what `Loader` would."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Unicode line breaks need double quotes: in any others PyYAML writes them as they are and reads spaces."""
        return self.represent_scalar(TAG + "str", text, '"' if set("\x85\u2028\u2029").intersection(text) else None)


class _Inline(_Dumper):
    """Only double quotes keep a line break on the line, and an alias would say nothing."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(TAG + "str", text, '"') if "\n" in text else super().represent_text(text)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(TAG + "float", SCALARS["float"], None)
_Dumper.add_representer(str, _Dumper.represent_text)
_Inline.add_representer(str, _Inline.represent_text)
