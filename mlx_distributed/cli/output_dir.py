"""The folder of a run: `config.yaml` (resolved), `run.json` (who it is), and a lock: one run at a time writes here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from mlx_distributed import __version__
from mlx_distributed.config import Config, to_yaml
from mlx_distributed.errors import ConfigError
from mlx_distributed.tracking import new_wandb_id

_LOCK, _PENDING, _RECORD_ASIDE = ".lock", ".config.yaml", ".run.json"
JOURNAL, ACCESS, ACCESS_ASIDE = "coordinator.journal", "coordinator.json", ".coordinator.json"
"""Of an elastic run."""
EVALUATION = "eval.json"
"""Of `mlx-train --eval-only`."""
DATA = "data.json"
"""What became of the rows (`data_report`)."""
_BEFORE_A_RUN = {_LOCK, _PENDING, _RECORD_ASIDE, JOURNAL, ACCESS, ACCESS_ASIDE, EVALUATION, DATA, "run.json", "logs"}
"""What a run that was refused leaves, or an evaluation; there is a run when rank 0 has accepted the configuration."""


@dataclass(frozen=True)
class RunRecord:
    """Who a run is; made once, and kept when it is resumed."""

    run_id: str
    wandb_id: str
    config_file: Path
    """The resolved configuration, until rank 0 accepts it."""
    lock: IO[bytes]
    """Held for as long as it is open: until this process ends, however it ends."""


def open_output_dir(config: Config, resume: bool, joined: tuple[str, str] | None = None) -> RunRecord:
    """Make the folder of a new run, or find the run that it holds.

    Args:
        config: of the run.
        resume: the folder may hold the run already.
        joined: run_id and wandb_id of a run that another machine has begun; None for one of our own.

    Raises:
        ConfigError: the folder holds another run or other files, a run is writing into it, or it cannot be written.
    """
    folder = config.output_dir
    record_file = folder / "run.json"
    try:
        holds_run = (folder / "config.yaml").is_file() and record_file.is_file()
        if holds_run and not resume:
            raise ConfigError(
                f"output_dir={folder} holds a run already; add --resume to go on with it, or take another --output-dir"
            )
        if not holds_run and folder.exists() and any(path.name not in _BEFORE_A_RUN for path in folder.iterdir()):
            raise ConfigError(
                f"output_dir={folder} is not empty and holds no run of this program; choose another --output-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context((folder / _LOCK).open("wb"))
            _take(lock, folder)
            if holds_run:
                run_id, wandb_id = _read(record_file)
                if joined is not None and run_id != joined[0]:
                    raise ConfigError(
                        f"output_dir={folder} holds the run {run_id}, and the one to be joined is {joined[0]}; choose "
                        "another --output-dir"
                    )
            else:
                run_id, wandb_id = joined or (uuid.uuid4().hex, new_wandb_id())
                _write(record_file, run_id, wandb_id)
            (folder / _PENDING).write_text(to_yaml(config), encoding="utf-8")
            stack.pop_all()  # From here on the lock stays with the record.
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be used: {error.strerror or error}") from None
    return RunRecord(run_id, wandb_id, folder / _PENDING, lock)


def accept_config(config: Config) -> None:
    """Put the configuration in place of the one before, now that nothing speaks against the run."""
    (config.output_dir / _PENDING).replace(config.output_dir / "config.yaml")


def config_file(folder: Path) -> Path:
    """The configuration of a run that has begun, accepted or not yet."""
    pending = folder / _PENDING
    return pending if pending.exists() else folder / "config.yaml"


def _take(lock: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"output_dir={folder}: a run is writing into it right now; end that one, or take another --output-dir"
        ) from None


def _read(record_file: Path) -> tuple[str, str]:
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        return str(record["run_id"]), str(record["wandb_id"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{record_file} is damaged; choose another --output-dir") from None


def _write(record_file: Path, run_id: str, wandb_id: str) -> None:
    """Aside, on disk, then renamed: without it the checkpoints of the run would not be found again."""
    versions = {name: version(name) for name in ("mlx", "mlx-lm", "grpcio", "transformers")}
    record = {
        "run_id": run_id,
        "wandb_id": wandb_id,
        "versions": {"mlx-distributed": __version__, "python": platform.python_version(), **versions},
    }
    aside = record_file.with_name(_RECORD_ASIDE)
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(record_file)
