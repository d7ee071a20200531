"""Generate `docs/configuration.md` from `mlx_distributed/config/schema.py`.

Run:
    uv run python scripts/generate_config_docs.py

Keys, types and defaults are those of the dataclasses; what a key means is the docstring under its field.
"""

from __future__ import annotations

import ast
import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mlx_distributed.config import Config, SourceConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
NAMES: dict[Any, str] = {
    **{str: "text", int: "whole number", float: "number", Path: "path", SourceConfig: "source"},
    **{bool: "`true`, `false`", type(None): "`null`", dict[str, str]: "mapping of text to text"},
    dict[str, Any]: "mapping",
}
HEAD = """\
# Configuration

<!-- Written by scripts/generate_config_docs.py from mlx_distributed/config/schema.py: change those. -->

One YAML file describes a run. Only a model and training data must be given; every other key has a default.

```yaml
model:
  path: mlx-community/Qwen3-0.6B-bf16
data:
  train: my-data.jsonl            # short for a list of one source with this path
optimizer:
  learning_rate: 1e-5
```

- **Paths** in the file are relative to the folder of the file, paths on the command line to the current folder; `~` is
  the home folder. A path of a model or of data that does not exist and does not look like one (as `./model` and
  `rows.jsonl` do) is taken for a name on the Hugging Face hub.
- **The command line** overrides the file: `mlx-train --config my.yaml train.epochs=3 'wandb.tags=[a, b]'`. Values are
  written as in YAML. Numbers count the items of a list from 0, as in `data.train.0.weight=2`. `--nproc N` is short for
  `parallel.nproc=N`, and `--output-dir DIR` for `output_dir=DIR`.
- **Values** follow YAML 1.2: `1e-5` is a number; only `true` and `false` are switches; `no`, `on` and `007` are text.
  Text is never turned into a number: `"3"` in quotes is refused where a number must stand. A key may be `null` only
  where a table below says so.
- **Unknown keys** and values that cannot be used are refused before anything starts, with exit status 2. All problems
  are listed at once, each with its line and with what would work.
- `--print-config` prints the whole configuration, defaults included, and stops. `--dry-run` also reads the data and the
  model, and reports what would be trained. Neither writes anything.
"""


def render() -> str:
    """The page."""
    return "\n".join([HEAD, *_sections()])


def _sections() -> Iterator[str]:
    yield from _table("Top level", "", Config)
    for name, kind in _dataclasses(Config, ""):
        yield from _table(f"`{name}`", f"{name}.", kind)
        if name == "data":
            yield from _table("A source: `data.train.N` and `data.validation.N`", "data.train.N.", SourceConfig)


def _dataclasses(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every section, those of sections included."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield prefix + name, hint
            yield from _dataclasses(hint, f"{prefix}{name}.")


def _table(title: str, prefix: str, kind: Any) -> Iterator[str]:
    """The lines about the fields of the dataclass `kind` that are no sections themselves."""
    defaults, meanings = kind(), read_docstrings(kind)
    yield from (f"## {title}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |")
    for name, hint in get_type_hints(kind).items():
        if not is_dataclass(hint):
            default = _as_yaml(getattr(defaults, name))
            yield f"| `{prefix}{name}` | {describe(hint)} | `{default}` | {meanings.get(name, '')} |"
    yield ""


def read_docstrings(kind: type) -> dict[str, str]:
    """Field -> the string literal under it, as a cell of a table; fields that have none are left out."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split()).replace("|", r"\|")
    return found


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return ", ".join(map(describe, args))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin is tuple:
        if get_origin(args[0]) is Literal:
            return f"list of {describe(args[0])}"
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"list of {count}{'name' if args[0] is str else describe(args[0])}s"
    return NAMES[hint]


def _as_yaml(default: Any) -> str:
    if isinstance(default, str | Path):
        return str(default) or '""'
    return json.dumps(default)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
