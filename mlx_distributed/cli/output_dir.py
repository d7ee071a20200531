"""The folder of a run: `config.yaml` (resolved) and `run.json` (who it is), written before anything starts."""

from __future__ import annotations

import json
import platform
import secrets
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mlx_distributed import __version__
from mlx_distributed.config import Config, to_yaml
from mlx_distributed.errors import ConfigError


@dataclass(frozen=True)
class RunRecord:
    """Who a run is; made once, and kept when it is resumed."""

    run_id: str
    wandb_id: str
    config_file: Path
    """The resolved configuration."""


def open_output_dir(config: Config, resume: bool) -> RunRecord:
    """Make the folder of a new run, or find the run that it holds.

    Raises:
        ConfigError: the folder holds another run or other files, or cannot be written.
    """
    folder = config.output_dir
    record_file, config_file = folder / "run.json", folder / "config.yaml"
    try:
        holds_run = record_file.is_file()
        if holds_run and not resume:
            raise ConfigError(
                f"output_dir={folder} holds a run already; add --resume to go on with it, or take another --output-dir"
            )
        if not holds_run and folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"output_dir={folder} is not empty and holds no run of this program; choose another --output-dir"
            )
        if holds_run:
            run_id, wandb_id = _read(record_file)
        else:
            run_id, wandb_id = uuid.uuid4().hex, secrets.token_hex(4)
            folder.mkdir(parents=True, exist_ok=True)
            _write(record_file, run_id, wandb_id)
        config_file.write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be used: {error.strerror or error}") from None
    return RunRecord(run_id, wandb_id, config_file)


def _read(record_file: Path) -> tuple[str, str]:
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        return str(record["run_id"]), str(record["wandb_id"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{record_file} is damaged; choose another --output-dir") from None


def _write(record_file: Path, run_id: str, wandb_id: str) -> None:
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "grpcio", "transformers")}
    record = {
        "run_id": run_id,
        "wandb_id": wandb_id,
        "versions": {"mlx-distributed": __version__, "python": platform.python_version(), **versions},
    }
    aside = record_file.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.rename(record_file)
