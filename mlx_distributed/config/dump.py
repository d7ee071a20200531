"""A `Config` in, plain values or YAML out."""

from __future__ import annotations

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
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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


_Dumper.add_implicit_resolver(TAG + "float", SCALARS["float"], None)
_Dumper.add_representer(str, _Dumper.represent_text)
