"""`mlx-distributed status`: who takes part in an elastic run, and how far it is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from mlx_distributed.cli.elastic.access import Access
from mlx_distributed.cli.elastic.invitation import PREFIXES, Invitation
from mlx_distributed.cli.elastic.reach import reach
from mlx_distributed.elastic.inquiry import RunStatus
from mlx_distributed.elastic.membership import Contact
from mlx_distributed.errors import ConfigError

HEADINGS = ("worker", "address", "share", "micro-batches/s", "link, Mbit/s", "round trip, ms", "step", "")

MBIT = 1e6 / 8
"""Bytes."""


def print_status(args: argparse.Namespace) -> int:
    """Print how a run stands; returns the exit status.

    Raises:
        ConfigError: `args.run` says of no coordinator.
        TrainingError: it does not answer.
    """
    print("\n".join(lines(find(args.run).status())))
    return 0


def find(run: str) -> Contact:
    """The coordinator of a join string or of a folder."""
    if run.startswith(tuple(PREFIXES.values())) and not Path(run).is_dir():
        return reach(Invitation.decode(run)).contact
    access = Access.read(Path(run))
    if access is None:
        raise ConfigError(
            f"{run} is neither a join string nor the output_dir of an elastic run that is under way; give the folder "
            "on the machine of the coordinator, or the string that it has printed"
        )
    return access.contact


def lines(status: RunStatus) -> Iterator[str]:
    """How a run stands, for people."""
    yield f"run {status.run_id}, step {status.num_committed} of {status.num_steps}"
    if status.epoch is not None:
        yield f"epoch {status.epoch.term}.{status.epoch.sequence}: {status.reason}"
    if status.waiting:
        yield status.waiting
    rows = [HEADINGS]
    for member in status.members:
        notes = [] if member.connected else ["not connected"]
        notes += ["waited for"] if member.waited_for else []
        notes += [f"silent for {member.silent_s:.1f} s"] if member.silent_s >= 1.0 else []
        rows.append(
            (
                member.name,
                member.address,
                "joining" if member.weight is None else f"{member.weight:g}",
                f"{member.speed:.3g}" if member.speed else "-",
                f"{member.bandwidth / MBIT:.0f}" if member.bandwidth else "-",
                f"{member.round_trip_s * 1e3:.1f}" if member.bandwidth else "-",
                "-" if member.num_committed < 0 else str(member.num_committed),
                ", ".join(notes),
            )
        )
    if status.members:
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    else:
        yield "no workers"
