"""`mlx-distributed coordinator`: the coordinator of a run on its own, without workers."""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import replace

from mlx_distributed import __version__
from mlx_distributed.cli.elastic.access import Access, prepare_access
from mlx_distributed.cli.elastic.crew import WORKER, Place, exit_status, start_crew
from mlx_distributed.cli.elastic.host import POLL_S, invite, tell
from mlx_distributed.cli.elastic.serving import Serving, make_rules
from mlx_distributed.cli.elastic.ssh import Remotes
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.machine.machine import this_machine
from mlx_distributed.cli.output_dir import ACCESS, RunRecord, accept_config, open_output_dir
from mlx_distributed.config import Config, load_config, to_yaml
from mlx_distributed.elastic.protocol import End
from mlx_distributed.errors import ConfigError


def coordinate(args: argparse.Namespace, module: str = WORKER) -> int:
    """Coordinate a run until it is over or this is interrupted; returns the exit status.

    Args:
        args: of the command line.
        module: the program of a worker; one is started to find out how long the run is.

    Raises:
        ConfigError: the configuration was refused, or the coordinator cannot start.
        TrainingError: it cannot go on.
    """
    overrides = ["elastic.enabled=true", *args.overrides]
    if args.output_dir is not None:
        overrides.append(f"output_dir={args.output_dir}")
    config = load_config(args.config, [*overrides, "parallel.nproc=1"])
    if config.elastic.listen is None:
        raise ConfigError(
            "elastic.listen is not set, so nobody could join; set it to an address of this machine that the workers "
            "reach, such as elastic.listen=192.168.1.20:4000"
        )
    return serve_alone(config, open_output_dir(config, resume=True), args.debug, module)


def serve_alone(
    config: Config, record: RunRecord, debug: bool, module: str = WORKER, remotes: Remotes | None = None
) -> int:
    """As `coordinate`, given a configuration.

    Args:
        config: of the run.
        record: of the run.
        debug: print tracebacks.
        module: the program of a worker.
        remotes: to be started when there is a coordinator for them; the run ends where none of them can train.

    Raises:
        ConfigError, TrainingError: as of `coordinate`.
    """
    access = _find_out(config, record, prepare_access(config, record.run_id), debug, module)
    if isinstance(access, int):
        return access
    accept_config(config)
    assert access.num_steps is not None
    assert access.config_digest is not None
    Interrupt()
    rules = make_rules(config, record.run_id, access.num_steps, access.config_digest)
    serving = Serving(config, record, access, rules, tell)
    end: End | None = None
    try:
        serving.access.write(config.output_dir)
        invite(serving.access, remotes)
        with this_machine().awake():
            while (end := serving.end(POLL_S)) is None:
                if not (remotes is None or remotes.may_train or serving.has_workers):
                    print("error: none of the hosts can train", file=sys.stderr)
                    return 1
    except KeyboardInterrupt:
        if remotes is None:
            print("interrupted: workers hold what they have, and go on when this is started again", file=sys.stderr)
        return INTERRUPTED
    finally:
        if remotes is not None:
            remotes.close(over=end is not None)
        serving.stop()
    if end.failed:
        print(f"error: {end.reason}", file=sys.stderr)
    else:
        (config.output_dir / ACCESS).unlink()
    return int(end.failed)


def _find_out(config: Config, record: RunRecord, access: Access, debug: bool, module: str) -> Access | int:
    """Have a worker read data and model, and end; what it says, or the exit status where they are refused.

    This process needs neither, and is to stay small. What was found out is kept, so that the workers that wait for a
    coordinator do not wait for that again.
    """
    text = to_yaml(config) + __version__
    found_for = hashlib.sha256(text.encode()).hexdigest()
    if access.found_for == found_for:
        return access
    place = Place("nobody", "127.0.0.1", access.token, access.identity)
    crew = start_crew(config, record, place, None, debug, module)
    try:
        while crew.watch(POLL_S):
            if enrolment := crew.enrolment:
                return replace(
                    access,
                    num_steps=enrolment.num_steps,
                    config_digest=enrolment.config_digest,
                    found_for=found_for,
                )
        return exit_status(crew.statuses, crew.num_interrupts, None)
    finally:
        crew.close()
