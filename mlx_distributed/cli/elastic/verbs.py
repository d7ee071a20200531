"""The verbs of `mlx-distributed` about elastic runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_distributed.cli.verb import Verbs, add_config, add_verb

COORDINATOR_EPILOG = """\
examples:
  mlx-distributed coordinator --config my.yaml elastic.listen=192.168.1.20:4000
  mlx-distributed coordinator --config my.yaml elastic.listen=studio.local:4000 elastic.min_workers=2

Workers then join with the string that is printed: mlx-train --join STRING. Ctrl-C stops the coordinator, not the run:
workers hold what they have, and go on when the same command is given again.

exit status: 0 the run is done; 1 it has failed; 2 the configuration or the data was refused; 130 interrupted
"""
LAUNCH_EPILOG = """\
examples:
  mlx-distributed launch --hosts b.local,ada@192.168.1.7 --config my.yaml
  mlx-distributed launch --hosts b,c --config my.yaml --remote-command 'uv run --project ~/mlx-distributed mlx-train'
  mlx-distributed launch --hostfile hosts.json --config my.yaml --resume
  mlx-distributed launch --hosts b.local --config my.yaml parallel.pipeline.num_stages=2

Each host needs a way in without a password (`ssh HOST` does not ask), the same version of mlx-distributed, and data and
model under the same paths as here, or by their names on the hub. This machine trains too, whether it is named or not;
with --nproc 0 it only coordinates, and the model is written on a host, into runs/joined-... in --cwd. Training begins
when this machine is ready (or elastic.min_workers are), the others join, and a host that fails is named and left out.

Hosts reach this machine at the address from which it reaches them, or at elastic.listen. The join string lets further
machines in. Ctrl-C saves, and ends all workers. A lost connection ends none; where this command is killed, they wait
for it to be given again with --resume, for elastic.coordinator_grace_s.

With a pipeline, or with parallel.num_workers, the run is not elastic: it begins when all hosts are there, with as many
workers each, and ends when one is lost. Its address is parallel.listen.

exit status: 0 the run is done; 1 it has failed; 2 the configuration, a host or the data was refused; 130 interrupted
"""
STATUS_EPILOG = """\
examples:
  mlx-distributed status runs/my-model
  mlx-distributed status mlxd1...

The folder is that of the coordinator, on the machine where it runs; anywhere else, give the join string.

exit status: 0 done; 1 nobody answers; 2 there is no coordinator in the folder, or the string is of no use
"""


def add_coordinator(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `coordinator`."""
    verb = add_verb(
        verbs,
        "coordinator",
        _coordinate,
        summary="coordinate an elastic run, without workers on this machine",
        description="Coordinate a run whose workers are on other machines, or in other commands on this one.",
        epilog=COORDINATOR_EPILOG,
    )
    add_config(verb)
    verb.add_argument("--output-dir", metavar="DIR", help="where its journal is written (output_dir)")


def add_launch(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `launch`."""
    verb = add_verb(
        verbs,
        "launch",
        _launch,
        summary="train on this machine and, over SSH, on others",
        description="Start a run on this machine, and have other machines join it over SSH.",
        epilog=LAUNCH_EPILOG,
    )
    hosts = verb.add_mutually_exclusive_group(required=True)
    hosts.add_argument("--hosts", metavar="A,B,...", help="other machines, named as for ssh")
    hosts.add_argument(
        "--hostfile", type=Path, metavar="JSON", help="file that names them, as of mlx.launch: ssh and ips are read"
    )
    add_config(verb)
    verb.add_argument(
        "--nproc", metavar="N", help="workers on this machine (parallel.nproc); 0 has it coordinate and not train"
    )
    verb.add_argument("--resume", action="store_true", help="go on with the run in output_dir, from what there is")
    verb.add_argument("--output-dir", metavar="DIR", help="where this machine writes (output_dir)")
    verb.add_argument(
        "--remote-command", default="mlx-train", metavar="CMD", help="how hosts start it, in a login shell (mlx-train)"
    )
    verb.add_argument("--cwd", metavar="DIR", help="folder on the hosts to start it in (the home folder)")
    verb.add_argument("--ssh", default="ssh", metavar="CMD", help="client, with options: 'ssh -F FILE -p 2222' (ssh)")


def add_status(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb `status`."""
    verb = add_verb(
        verbs,
        "status",
        _status,
        summary="show the workers of an elastic run, and how far it is",
        description="Ask the coordinator of a run for its workers, the last step taken, and who is waited for.",
        epilog=STATUS_EPILOG,
    )
    verb.add_argument("run", metavar="STRING-or-DIR", help="the join string, or the output_dir of the coordinator")


# What these import takes a moment, which `--help` and a mistyped verb need not wait for.


def _coordinate(args: argparse.Namespace) -> int:
    from mlx_distributed.cli.elastic.coordinator import coordinate

    return coordinate(args)


def _launch(args: argparse.Namespace) -> int:
    from mlx_distributed.cli.elastic.launch import launch

    return launch(args)


def _status(args: argparse.Namespace) -> int:
    from mlx_distributed.cli.elastic.status import print_status

    return print_status(args)
