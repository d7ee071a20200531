from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mlx_distributed.config import Config, SourceConfig, load_config, to_dict

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\S+)` \| .*? \| `(.*?)` \|", PAGE, flags=re.MULTILINE)
"""Key and default."""


def load_script() -> ModuleType:
    path = ROOT / "scripts" / "generate_config_docs.py"
    spec = importlib.util.spec_from_file_location("generate_config_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate_config_docs = load_script()


@dataclass
class Section:
    first: int = 0
    """Of two
    lines, a | b."""
    second: int = 0
    third: int = 0
    """The third."""

    @property
    def fourth(self) -> int:
        """Not a field."""
        return 4


def keys_of(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of the values; an empty mapping is a value."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_page_is_current() -> None:
    assert generate_config_docs.render() == PAGE, "run: uv run python scripts/generate_config_docs.py"


def test_every_key_stands_in_the_page_once() -> None:
    keys = [*keys_of(to_dict(Config())), *keys_of(asdict(SourceConfig()), "data.train.N.")]
    assert sorted(key for key, _ in ROWS) == sorted(keys)


def test_the_defaults_in_the_page_are_what_an_unset_key_means(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    (tmp_path / "rows.jsonl").touch()
    path.write_text("model: {path: some/model}\ndata: {train: rows.jsonl}\n")
    own = ("model.path", "data.train", "data.train.N.path", "output_dir")
    defaults = [f"{key.replace('.N.', '.0.')}={default}" for key, default in ROWS if key not in own]
    assert len(defaults) == len(ROWS) - len(own)
    assert load_config(path, defaults) == load_config(path)


def test_the_example_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "my-data.jsonl").touch()
    (tmp_path / "my.yaml").write_text(example)
    config = load_config(tmp_path / "my.yaml")
    assert [source.path for source in config.data.train] == [str(tmp_path / "my-data.jsonl")]
    assert config.optimizer.learning_rate == 1e-5


def test_docstrings_of_fields_become_cells() -> None:
    assert generate_config_docs.read_docstrings(Section) == {"first": r"Of two lines, a \| b.", "third": "The third."}
