"""`mlx-train` with workers on several machines that are all there from the beginning to the end.

The first machine has rank 0, which reads and writes checkpoints and the finished model; the others need a folder for
their logs alone. Ranks are in the order in which machines come, so that neighbours in it are the stages of one copy.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.elastic.join import config_here
from mlx_distributed.cli.elastic.ssh import Remotes
from mlx_distributed.cli.local import log_files, training_job, worker_environment, worker_jobs
from mlx_distributed.cli.machine.interfaces import resolve
from mlx_distributed.cli.machine.machine import this_machine
from mlx_distributed.cli.meeting.guest import come
from mlx_distributed.cli.meeting.host import Meeting
from mlx_distributed.cli.meeting.machines import MachineGroup
from mlx_distributed.cli.meeting.place import Line, Place, ranks
from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.config import Config, to_yaml
from mlx_distributed.errors import ConfigError, MlxDistributedError

WORKER = "mlx_distributed.cli.worker"
MAX_WORKERS = 64
"""That one machine may bring."""


def lead(config: Config, job: Mapping[str, Any], logs: Path, debug: bool, remotes: Remotes | None = None) -> int:
    """Be the first machine: wait for the others, and train with them; returns the exit status.

    Args:
        config: of the run.
        job: what all workers of this machine are told.
        logs: folder of their log files.
        debug: have workers print tracebacks.
        remotes: to be started when they are waited for.

    Raises:
        ConfigError: `parallel.listen` cannot be listened on.
        MlxDistributedError: the others have not come.
    """
    assert config.parallel.listen is not None
    listen = resolve(config.parallel.listen, this_machine().interfaces(), "parallel.listen")
    num_here, over = config.parallel.nproc, False

    def check() -> None:
        if remotes is not None and not remotes.all_may_train:
            raise MlxDistributedError("a host cannot take part, and the run cannot begin without it")

    with contextlib.closing(Meeting(listen, "run", "parallel.listen=")) as meeting:
        try:
            text = meeting.invitation.encode()
            _tell(f"join string, for whoever may read the data and the model: {text}")
            _tell(f"on another machine: mlx-train --join {text}")
            if remotes is not None:
                remotes.start(text)
            guests = meeting.wait(num_here, config.parallel.size, _tell, check=check)
            told = {"config": to_yaml(config), **{key: job[key] for key in ("run_id", "wandb_id", "eval_only")}}
            place, lines = meeting.begin(told, num_here, guests)
            for who in (f"{ranks(0, num_here)}, this machine ({meeting.host})", *(line.who for line in lines)):
                _tell(who)
            status = _train(job, logs, place, lines, debug, quiet=False)
            over = True
            return status
        finally:
            if remotes is not None:
                remotes.close(over)


def join(text: str, nproc: str | None, output_dir: Path | None, debug: bool, quiet: bool, listen: str | None) -> int:
    """Take part in a run that another machine has begun, to its end; returns the exit status.

    Args:
        text: the join string.
        nproc: workers to start, 1 where it is not given.
        output_dir: for their logs; None takes a folder of the run's name in `runs/`.
        debug: have workers print tracebacks.
        quiet: whoever reads what they say hears it from rank 0 already.
        listen: host and port at which others reach these workers, the first of them where there are several; port 0
            takes free ones. None takes the interface that reaches the first machine.

    Raises:
        ConfigError: the join string is of no use, or this machine cannot take part.
        TrainingError: nobody answers.
        MlxDistributedError: the first machine has given up.
    """
    num_workers, host, overrides = _whole_number(nproc or "1"), None, []
    if listen is not None:
        host, _, port = listen.rpartition(":")
        overrides.append(f"parallel.port={port}")
    invitation = Invitation.decode(text)
    control, place = come(invitation, "run", num_workers, host, _tell)
    try:
        told = {key: str(place.job[key]) for key in ("config", "run_id", "wandb_id")}
        folder = output_dir or Path("runs") / f"joined-{told['run_id'][:8] or 'evaluation'}"
        overrides += [f"parallel.nproc={num_workers}", f"output_dir={folder.absolute()}"]
        config = config_here(told["config"], invitation.address, overrides)
        record = open_output_dir(config, resume=True, joined=(told["run_id"], told["wandb_id"]))
    except MlxDistributedError as error:
        control.send(ended=error.exit_status, error=str(error))
        control.close()
        raise
    job = {**training_job(record, None), "eval_only": bool(place.job["eval_only"])}
    _tell(f"{ranks(place.first_rank, num_workers)} of {len(place.machines)}; rank 0 is on {place.machines[0]}")
    lines = [Line(control, f"rank 0, {place.machines[0]}")]
    return _train(job, config.output_dir / "logs", place, lines, debug, quiet)


def _train(job: Mapping[str, Any], logs: Path, place: Place, lines: Sequence[Line], debug: bool, quiet: bool) -> int:
    env, hint = worker_environment(os.environ, sys.platform)
    if hint:
        print(hint, file=sys.stderr)
    own = {key: getattr(place, key) for key in ("first_rank", "host", "machines", "identity")}
    jobs = worker_jobs(job, place.num_workers, place.secret, {**own, "quiet": quiet})
    return MachineGroup(place, lines, jobs, log_files(logs, place.num_workers), env, debug, WORKER).train()


def _whole_number(nproc: str) -> int:
    if not (nproc.isascii() and nproc.isdecimal() and 1 <= int(nproc) <= MAX_WORKERS):
        raise ConfigError(f"--nproc {nproc}: must be a whole number from 1 to {MAX_WORKERS}")
    return int(nproc)


def _tell(line: str) -> None:
    print(line, flush=True)
