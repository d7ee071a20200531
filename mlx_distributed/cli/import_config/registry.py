"""`dataset_info.json` of LLaMA-Factory: what the names of its data sets stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_distributed.cli.import_config.rules import Theirs, locate
from mlx_distributed.errors import ConfigError

FILE = "dataset_info.json"
MAX_BYTES = 10_000_000
PREFERENCES = ("ranking", "chosen", "rejected", "kto_tag")
MEDIA = ("images", "videos", "audios")
FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Entry:
    """One data set."""

    source: dict[str, Any]
    """As an entry of `data.train`."""
    unknown: tuple[str, ...] = ()
    """What of it has no counterpart."""
    refused: tuple[str, ...] = field(default=())
    """The same, where something else would be trained."""


def find(theirs: Theirs) -> tuple[Path, Mapping[str, Any]] | None:
    """The registry and its folder: in `dataset_dir`, seen from the current folder or theirs, or beside the YAML.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    named = theirs.get("dataset_dir")
    inner = named if isinstance(named, str) else "data"
    path = locate(f"{inner}/{FILE}", Path.cwd(), theirs.folder) or locate(FILE, theirs.folder)
    if path is None:
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, too many for a list of data sets")
        registry = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); mend it, or move it away") from error
    if not isinstance(registry, dict):
        raise ConfigError(f"{path} must be an object with a name for every data set")
    return path.parent, registry


def entry(name: str, given: Any, folder: Path, theirs: Theirs) -> Entry:
    """What the entry `given` of the registry in `folder` is here."""
    if not isinstance(given, dict):
        return Entry({"path": name}, (f"{name} is not in {FILE}",))
    columns, tags = (_mapping(given.get(part)) for part in ("columns", "tags"))
    format = FORMATS.get(str(given.get("formatting", "alpaca")), "auto")
    local = given.get("file_name")
    path = theirs.path(str(folder / local)) if isinstance(local, str) else str(given.get("hf_hub_url", name))
    source: dict[str, Any] = {"path": path, "format": format}
    for theirs_name, ours in (("split", "split"), ("subset", "subset")):
        if isinstance(given.get(theirs_name), str):
            source[ours] = given[theirs_name]
    turns = {"messages": "messages" if format == "messages" else "conversations"}
    known = {"system": "system", **(COLUMNS if format == "alpaca" else {**turns, "tools": "tools"})}
    named = {ours: columns[key] for key, ours in known.items() if columns.get(key)}
    named |= {ours: tags[key] for key, ours in (("role_tag", "role"), ("content_tag", "content")) if tags.get(key)}
    source |= {"columns": named} if named else {}
    roles = {str(tags[key]): ours for key, ours in ROLES.items() if tags.get(key)}
    source |= {"roles": roles} if roles else {}
    read = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "split", "subset"}
    rest = [key for key in given if key not in {*read, "columns", "tags"}]
    rest += [f"columns.{key}" for key in columns if key not in known]
    rest += [f"tags.{key}" for key in tags if key not in {*ROLES, "role_tag", "content_tag"}]
    last = {key: key.rpartition(".")[2] for key in rest}
    refused = tuple(f"{name}.{key}" for key in rest if last[key] in (*PREFERENCES, *MEDIA))
    return Entry(source, tuple(f"{name}.{key}" for key in rest if f"{name}.{key}" not in refused), refused)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
