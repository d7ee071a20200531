"""What the verbs of `mlx-distributed` have in common on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Verbs = argparse._SubParsersAction  # argparse has no public name for it
Body = Callable[[argparse.Namespace], int]


def add_verb(
    verbs: Verbs[argparse.ArgumentParser], name: str, body: Body, *, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """A verb whose own arguments are yet to be added.

    Args:
        verbs: that it is added to.
        name: as it is typed.
        body: is given what was typed, and returns the exit status.
        summary: in the list of verbs.
        description: first in its `--help`.
        epilog: last there, as it is.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    verb = verbs.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=formatter)
    verb.add_argument("--debug", action="store_true", help="print tracebacks")
    verb.set_defaults(body=body)
    return verb


def add_config(verb: argparse.ArgumentParser) -> None:
    """The arguments of a verb that is about a run."""
    verb.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the file")
