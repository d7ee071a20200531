"""`data.json` in the folder of a run: what became of the rows, for the model card."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from mlx_distributed.cli.output_dir import DATA
from mlx_distributed.data.sources import DataReport
from mlx_distributed.errors import ConfigError


def record_data(folder: Path, report: DataReport) -> None:
    """Write the counts of a data report for `read_data`; the rows that it shows are left out.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        record = asdict(replace(report, examples=()))
        (folder / DATA).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be written: {error.strerror}") from error


def read_data(folder: Path) -> DataReport | None:
    """The data report of a run; None where it has none, or it is not what `record_data` writes."""
    try:
        record = json.loads((folder / DATA).read_text(encoding="utf-8"))
        report = DataReport(**record | {"examples": ()})
    except (OSError, ValueError, TypeError):
        return None
    counts = [value for name, value in asdict(report).items() if name not in ("invalid", "examples", "streaming")]
    counts += report.invalid.values() if isinstance(report.invalid, dict) else [None]
    return report if all(type(count) is int for count in counts) else None
