"""The verbs of `mlx-distributed` about elastic runs."""

from __future__ import annotations

import argparse
from pathlib import Path

COORDINATOR_EPILOG = """\
examples:
  mlx-distributed coordinator --config my.yaml elastic.listen=192.168.1.20:4000
  mlx-distributed coordinator --config my.yaml elastic.listen=studio.local:4000 elastic.min_workers=2

Workers then join with the string that is printed: mlx-train --join STRING. Ctrl-C stops the coordinator, not the run:
workers hold what they have, and go on when the same command is given again.

exit status: 0 the run is done; 1 it has failed; 2 the configuration or the data was refused; 130 interrupted
"""
STATUS_EPILOG = """\
examples:
  mlx-distributed status runs/my-model
  mlx-distributed status mlxd1...

The folder is that of the coordinator, on the machine where it runs; anywhere else, give the join string.

exit status: 0 done; 1 nobody answers; 2 there is no coordinator in the folder, or the string is of no use
"""


def add_coordinator(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `coordinator`."""
    verb = verbs.add_parser(
        "coordinator",
        help="coordinate an elastic run, without workers on this machine",
        description="Coordinate a run whose workers are on other machines, or in other commands on this one.",
        epilog=COORDINATOR_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
    verb.add_argument("--output-dir", metavar="DIR", help="where its journal is written (output_dir)")
    verb.add_argument("--debug", action="store_true", help="print tracebacks")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the file")
    verb.set_defaults(body=_coordinate)


def add_status(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `status`."""
    verb = verbs.add_parser(
        "status",
        help="show the workers of an elastic run, and how far it is",
        description="Ask the coordinator of a run for its workers, the last step taken, and who is waited for.",
        epilog=STATUS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("run", metavar="STRING-or-DIR", help="the join string, or the output_dir of the coordinator")
    verb.add_argument("--debug", action="store_true", help="print tracebacks")
    verb.set_defaults(body=_status)


# What these import takes a moment, which `--help` and a mistyped verb need not wait for.


def _coordinate(args: argparse.Namespace) -> int:
    from mlx_distributed.cli.elastic.coordinator import coordinate

    return coordinate(args)


def _status(args: argparse.Namespace) -> int:
    from mlx_distributed.cli.elastic.status import print_status

    return print_status(args)
