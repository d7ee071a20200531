"""Reads what wandb writes when it is offline: `run-<id>.wandb`, a 7-byte header, then the log format of LevelDB. And
keeps it away from the home folder."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32768
CHUNK_HEADER = struct.Struct(
    "<IHB"
)  # checksum, length, and 1 for a whole record, 2, 3, 4 for its first, middle, last part
WHOLE, LAST = 1, 4


@dataclass
class WandbRun:
    """One `.wandb` file. `history` holds the logged rows without wandb's own columns, whose names begin with `_`;
    `num_records` counts records by their type."""

    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    exit_code: int | None = None
    num_records: Counter[str] = field(default_factory=Counter)

    @property
    def aliases(self) -> dict[str, list[list[str]]]:
        """Of each artifact, by name, in the order in which they were logged."""
        found: dict[str, list[list[str]]] = {}
        for artifact in self.artifacts:
            found.setdefault(artifact.name, []).append(sorted(artifact.aliases))
        return found

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key != "_wandb"}


def keep_from_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which wandb has never run."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(home / name))
        (home / name).mkdir(parents=True)
    monkeypatch.setenv("NETRC", str(home / "netrc"))


def read_runs(folder: Path) -> list[WandbRun]:
    """The offline runs in `folder`, in the order in which they were written."""
    return [_read(path) for path in sorted(folder.glob("offline-run-*/*.wandb"))]


def _read(path: Path) -> WandbRun:
    read = WandbRun()
    for record in _records(path.read_bytes()):
        read.num_records[record.WhichOneof("record_type")] += 1
        match record.WhichOneof("record_type"):
            case "run":
                read.run = record.run
            case "history":
                row = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                read.history.append({name: value for name, value in row.items() if not name.startswith("_")})
            case "artifact":
                read.artifacts.append(record.artifact)
            case "metric":
                read.metrics.append(record.metric)
            case "exit":
                read.exit_code = record.exit.exit_code
    return read


def _records(data: bytes) -> Iterator[Any]:
    position, parts = FILE_HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(data):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < CHUNK_HEADER.size:
            position += room
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""
