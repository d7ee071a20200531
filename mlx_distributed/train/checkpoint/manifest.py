"""`Manifest`: what a checkpoint says about itself, and the check of one that anybody may have written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from mlx_distributed import __version__
from mlx_distributed.errors import ConfigError

SCHEMA_VERSION = 1
"""Goes up whenever a program that knows only the old schema would misread the new one."""
FILES = ("params.safetensors", "optimizer.safetensors")
_OF_A_RANK = re.compile(r"rank-[0-9]{4}\.safetensors")


def rank_file(rank: int) -> str:
    """What only this rank has had."""
    return f"rank-{rank:04d}.safetensors"


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint."""

    num_bytes: int
    sha256: str
    """Hex."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint holds besides arrays."""

    step: int
    """Steps committed."""
    num_tokens: int
    """Label tokens trained on so far."""
    num_skipped: int
    """Steps skipped in a row, up to this one."""
    run_id: str
    wandb_id: str | None
    facts: Mapping[str, str]
    """What must stay the same for the run to go on with the same bits, such as a digest of the data."""
    metrics: Mapping[str, float]
    """Of an evaluation at this very step. Those that are not finite are not stored: JSON has no word for them."""
    program_version: str = __version__
    evaluations: tuple[Mapping[str, float | None], ...] = ()
    """What decides about early stopping, from `best.to_lines`: all evaluations so far."""

    def check_facts(self, facts: Mapping[str, str]) -> None:
        """Check that a run with these facts can go on from here.

        Raises:
            ConfigError: it has another model, other data or another plan; names both sides of each difference.
        """
        differences = [
            f"{name} is {_short(self.facts.get(name))} there and {_short(facts.get(name))} here"
            for name in dict.fromkeys([*facts, *self.facts])
            if self.facts.get(name) != facts.get(name)
        ]
        if differences:
            raise ConfigError(
                f"this run cannot go on from the checkpoint of step {self.step}: {', '.join(differences)}; give it the "
                "configuration and the data that the checkpoint was made with, or start anew in another output_dir"
            )


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    files: Mapping[str, FileEntry]
    """By name: those of `FILES`, and where ranks have something that others do not, one of each rank besides."""
    meta: CheckpointMeta

    @property
    def of_ranks(self) -> tuple[str, ...]:
        """The files of single ranks, in rank order; empty where all have the same."""
        return tuple(sorted(self.files.keys() - set(FILES)))

    def to_json(self) -> str:
        """Text that `parse` reads."""
        record = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        record["meta"]["metrics"] = {k: float(v) for k, v in self.meta.metrics.items() if math.isfinite(v)}
        return json.dumps(record, indent=2) + "\n"

    @classmethod
    def parse(cls, text: bytes, path: Path) -> Manifest:
        """Read a manifest that may hold anything. No files but those of `FILES` and `rank_file` can be named.

        Args:
            text: its bytes.
            path: the checkpoint, for the message.

        Raises:
            ValueError: it is not a manifest; the message completes "the manifest ...".
            ConfigError: a newer program wrote it.
        """
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from error
        version = record.get("schema_version") if isinstance(record, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError("has no schema version")
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{path} was written with schema {version}, and this program, mlx-distributed {__version__}, knows "
                f"schemas up to {SCHEMA_VERSION}; update it with `pip install --upgrade mlx-distributed`, or take a "
                "checkpoint that this version wrote"
            )
        record = _record(record, "manifest", ("schema_version", "files", "meta"))
        num_ranks = sum(1 for name in _names(record["files"]) if _OF_A_RANK.fullmatch(name))
        names = (*FILES, *map(rank_file, range(num_ranks)))
        files = _record(record["files"], "files", names)
        return cls({name: _file_entry(files[name], name) for name in names}, _meta(record["meta"]))


def _names(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _record(value: object, what: str, names: tuple[str, ...]) -> dict:
    """`value`, if it is an object with just these entries."""
    if not isinstance(value, dict) or value.keys() != set(names):
        raise ValueError(f"does not have just the entries {', '.join(names)} in {what}")
    return value


def _file_entry(value: object, name: str) -> FileEntry:
    entry = FileEntry(**_record(value, name, ("num_bytes", "sha256")))
    if not _is_count(entry.num_bytes) or type(entry.sha256) is not str:
        raise ValueError(f"has no size and hash of {name}")
    return entry


def _meta(value: object) -> CheckpointMeta:
    meta = CheckpointMeta(**_record(value, "meta", tuple(field.name for field in fields(CheckpointMeta))))
    if isinstance(meta.evaluations, list):
        meta = replace(meta, evaluations=tuple(meta.evaluations))
    right = {
        "step": _is_count(meta.step),
        "num_tokens": _is_count(meta.num_tokens),
        "num_skipped": _is_count(meta.num_skipped),
        "run_id": type(meta.run_id) is str,
        "wandb_id": type(meta.wandb_id) is str or meta.wandb_id is None,
        "facts": isinstance(meta.facts, dict) and all(type(fact) is str for fact in meta.facts.values()),
        "metrics": isinstance(meta.metrics, dict) and all(map(_is_finite, meta.metrics.values())),
        "program_version": type(meta.program_version) is str,
        "evaluations": isinstance(meta.evaluations, tuple) and all(map(_is_evaluation, meta.evaluations)),
    }
    if not all(right.values()):
        raise ValueError(f"has a value that cannot be right: {', '.join(name for name in right if not right[name])}")
    return meta


def _is_count(value: object) -> bool:
    """Whether a run can have counted so far; True is not 1 here."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_evaluation(line: object) -> bool:
    if not isinstance(line, dict) or not _is_count(line.get("step")):
        return False
    return all(value is None or _is_finite(value) for name, value in line.items() if name != "step")


def _short(fact: str | None) -> str:
    """A fact for a message: of a SHA-256, enough to tell it from another."""
    if fact is None:
        return "missing"
    return fact[:12] if len(fact) == 64 else fact
