"""`mlx-distributed launch`: a run with workers on this machine and, over SSH, on others.

It is elastic, and coordinated here: training begins as soon as the workers of this machine are ready (or
`elastic.min_workers` are), and the others join: who is late costs nobody anything. This machine trains unless told not
to, as whoever was there first writes the model. Where the configuration asks for a pipeline or for `num_workers`, it is
a group that begins when all are there.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace

from mlx_distributed.cli.elastic.coordinator import serve_alone
from mlx_distributed.cli.elastic.crew import WORKER
from mlx_distributed.cli.elastic.host import host
from mlx_distributed.cli.elastic.hostfile import Host, parse_hosts, read_hostfile
from mlx_distributed.cli.elastic.ssh import OPTIONS, Remotes, folder_for, listen_towards, remote_command
from mlx_distributed.cli.local import training_job
from mlx_distributed.cli.meeting.launching import is_fixed, read_fixed
from mlx_distributed.cli.meeting.training import lead
from mlx_distributed.cli.output_dir import RunRecord, open_output_dir
from mlx_distributed.config import Config, load_config
from mlx_distributed.errors import ConfigError


def launch(args: argparse.Namespace, module: str = WORKER) -> int:
    """Start a run, or go on with it, and stay until it is over; returns the exit status.

    Args:
        args: of the command line.
        module: the program of a worker of this machine.

    Raises:
        ConfigError: the configuration or a host was refused, or the coordinator cannot start.
        TrainingError: the coordinator cannot go on.
    """
    named = read_hostfile(args.hostfile) if args.hosts is None else parse_hosts(args.hosts)
    hosts = [each for each in named if not each.is_here]
    trains = args.nproc != "0"
    if not hosts:
        raise ConfigError(
            "no other machine is named: mlx-train trains on this one, and with elastic.listen it lets others join"
        )
    if not trains and len(hosts) < len(named):
        raise ConfigError(
            "--nproc 0 keeps this machine from training, and it is named among the hosts; drop one of the two"
        )
    ssh, resume = _client(args.ssh), "auto" if args.resume else None
    if is_fixed(args):
        config = read_fixed(args, ssh, hosts)
        record = open_output_dir(config, resume=args.resume)
        each_brings = ["--nproc", str((config.parallel.size - config.parallel.nproc) // len(hosts))]
        commands = {each.name: _command(args, ssh, each, record, each_brings) for each in hosts}
        remotes = Remotes(commands, args.remote_command, "the run cannot begin without it")
        return lead(config, training_job(record, resume), config.output_dir / "logs", args.debug, remotes)
    config = _config(args, trains, ssh, hosts)
    record = open_output_dir(config, resume=args.resume)
    remotes = Remotes({each.name: _command(args, ssh, each, record) for each in hosts}, args.remote_command)
    if trains:
        return host(config, record, resume, args.debug, module, remotes)
    return serve_alone(config, record, args.debug, module, remotes)


def _client(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--ssh={text!r}: {error}; quote it as for a shell") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"--ssh={text!r}: there is no such program on this machine; install OpenSSH's client")
    return words


def _config(args: argparse.Namespace, trains: bool, ssh: Sequence[str], hosts: Sequence[Host]) -> Config:
    overrides = ["elastic.enabled=true", *args.overrides]
    if args.output_dir is not None:
        overrides.append(f"output_dir={args.output_dir}")
    if args.nproc is not None or not trains:
        overrides.append(f"parallel.nproc={args.nproc if trains else 1}")
    config = load_config(args.config, overrides)
    if config.elastic.listen is not None:
        return config
    listen = listen_towards(ssh, hosts, "elastic.listen")
    return replace(config, elastic=replace(config.elastic, listen=listen))


def _command(
    args: argparse.Namespace, ssh: Sequence[str], each: Host, record: RunRecord, more: Sequence[str] = ()
) -> list[str]:
    arguments = ["--join", "-", "--attended", "--output-dir", folder_for(record.run_id, each.name), *more]
    if args.debug:
        arguments.append("--debug")
    return [*ssh, *OPTIONS, "--", each.name, remote_command(args.remote_command, arguments, args.cwd)]
