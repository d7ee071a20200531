"""A configuration of an elastic run, and its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from mlx_distributed.cli.output_dir import RunRecord, open_output_dir
from mlx_distributed.config import Config, load_config


def open_config(folder: Path, *overrides: str) -> Config:
    """Of a model that nobody looks at, since `small_worker` needs none."""
    (folder / "rows.jsonl").touch()
    path = folder / "config.yaml"
    plain = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}, "output_dir": "out"}
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return load_config(path, ["elastic.enabled=true", *overrides])


@contextmanager
def opened(config: Config) -> Iterator[RunRecord]:
    """The folder of a run, held until the end."""
    record = open_output_dir(config, resume=True)
    with record.lock:
        yield record
