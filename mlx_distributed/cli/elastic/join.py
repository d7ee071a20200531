"""`mlx-train --join`: workers on this machine for a run that another machine has begun."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from mlx_distributed import __version__
from mlx_distributed.cli.elastic.attended import Attendance
from mlx_distributed.cli.elastic.crew import WORKER, Place, exit_status, hostname, start_crew
from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.elastic.reach import reach
from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.comm.tls import Identity
from mlx_distributed.config import Config, load_config
from mlx_distributed.errors import ConfigError

POLL_S = 0.1


def join(
    text: str,
    nproc: str | None,
    output_dir: Path | None,
    debug: bool,
    module: str = WORKER,
    attendance: Attendance | None = None,
    listen: str | None = None,
) -> int:
    """Take part in a run until it is over, or until this is interrupted; returns the exit status.

    Args:
        text: the join string.
        nproc: workers to start, 1 where it is not given.
        output_dir: where they write; None takes a folder of the run's name in `runs/`.
        debug: have workers print tracebacks.
        module: the program of a worker.
        attendance: of whoever has started this from another machine; None where a person has.
        listen: host and port at which others reach these workers, the first of them where there are
            several; port 0 takes free ones. None takes the interface that reaches the coordinator.

    Raises:
        ConfigError: the join string is of no use, or this machine cannot take part.
        TrainingError: nobody answers, or the run is over.
    """
    reached = reach(Invitation.decode(text))
    description = reached.contact.describe()
    if description.program_version != __version__:
        raise ConfigError(
            f"the run at {reached.contact.address} was started with mlx-distributed {description.program_version}, and "
            f"this is {__version__}: the same bits are promised within one version only; install that version here"
        )
    folder = output_dir or Path("runs") / f"joined-{description.run_id[:8]}"
    overrides = [f"parallel.nproc={nproc or '1'}", f"output_dir={folder.absolute()}"]
    config = config_here(description.config, reached.contact.address, overrides)
    record = open_output_dir(config, resume=True, joined=(description.run_id, description.wandb_id))
    identity = Identity(description.key, description.certificate)
    host = reached.local_host
    if listen is not None:
        host, _, port = listen.rpartition(":")
        config = replace(config, parallel=replace(config.parallel, port=int(port)))
    names, quiet = f"{hostname()}-{os.getpid()}", attendance is not None
    place = Place(names, host, reached.contact.token, identity, joined=True, quiet=quiet)
    crew = start_crew(config, record, place, None, debug, module)
    try:
        while crew.watch(POLL_S):
            if crew.enrolment:
                crew.answer(reached.contact.address)
            if attendance is not None and attendance.is_over(reached.contact, config.elastic.coordinator_grace_s):
                attendance = None
                os.kill(os.getpid(), signal.SIGINT)
        return exit_status(crew.statuses, crew.num_interrupts, None)
    finally:
        crew.close()


def config_here(config: str, address: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run that was begun elsewhere, as it is used on this machine.

    Args:
        config: resolved, as YAML.
        address: where the run is, for the error.
        overrides: what is of this machine alone.

    Raises:
        ConfigError: data or a model are not here, or an override cannot be used.
    """
    if missing := missing_files(config):
        raise ConfigError(
            f"the run at {address} trains on what is not on this machine: {', '.join(missing)}; every "
            "worker reads data and model itself, so put them in the same place here (a copy, a link or a shared "
            "folder), or start the run with names on the Hugging Face hub"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config-of-the-run.yaml"
        path.write_text(config, encoding="utf-8")
        # Where the run keeps tokenised rows may be no place to write to here.
        return load_config(path, ["data.cache_dir=null", *overrides])


def missing_files(config: str) -> list[str]:
    """`key=path` of the data, models and templates in a resolved configuration that are paths with nothing there."""
    plain = yaml.safe_load(config)
    named = {"model.path": plain["model"]["path"]}
    for split in ("train", "validation"):
        named |= {f"data.{split}.{index}.path": source["path"] for index, source in enumerate(plain["data"][split])}
    # Those that exist where the run was started are absolute; all others are names on the hub.
    template = plain["data"]["chat_template"]
    if template is not None and "{" not in template:
        named["data.chat_template"] = template
    return [
        f"{key}={path}" for key, path in named.items() if path and Path(path).is_absolute() and not Path(path).exists()
    ]
