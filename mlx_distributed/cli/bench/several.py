"""A benchmark whose ranks are on several machines, each started by a command of its own there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.bench.report import Report
from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.local import worker_environment
from mlx_distributed.cli.meeting.guest import come
from mlx_distributed.cli.meeting.host import Meeting
from mlx_distributed.cli.meeting.machines import MachineGroup
from mlx_distributed.cli.meeting.place import Line, Place

PROGRAM = "mlx_distributed.cli.bench.rank"
GRACE_S = 5.0
"""A rank inside the ring has no deadline; when another one has gone, it is ended after this."""


def host(
    options: Options,
    meeting: Meeting,
    tell: Callable[[str], None],
    report: Report,
    debug: bool,
) -> int:
    """Be rank 0, on this machine, and measure together with those that come; returns the exit status.

    Args:
        options: of the benchmark.
        meeting: that they come to.
        tell: is given lines for people.
        report: is given what rank 0 says.
        debug: have the rank print tracebacks.

    Raises:
        MlxDistributedError: they have not come.
    """
    tell(f"on each of the other machines: mlx-distributed bench join {meeting.invitation.encode()}")
    guests = meeting.wait(1, options.num_ranks, tell)
    place, lines = meeting.begin(asdict(options), 1, guests)
    for who in (f"rank 0, this machine ({meeting.host})", *(line.who for line in lines)):
        tell(who)
    report.begin()
    return _measure(place, lines, report.hear, debug)


def join(text: str, debug: bool) -> int:
    """Be a rank of the benchmark of another machine; returns the exit status.

    Args:
        text: the join string.
        debug: have the rank print tracebacks.

    Raises:
        ConfigError: the string is of no use.
        MlxDistributedError: the other machine is not there, or has given up.
    """
    control, place = come(Invitation.decode(text), "benchmark")
    print(f"rank {place.first_rank} of {len(place.machines)}; rank 0 shows the figures", flush=True)
    return _measure(place, [Line(control, f"rank 0, {place.machines[0]}")], lambda message: None, debug)


def _measure(place: Place, lines: Sequence[Line], hear: Callable[[Mapping[str, Any]], None], debug: bool) -> int:
    env, _ = worker_environment(os.environ, sys.platform)  # no hint: nothing here multiplies matrices
    job = {
        "rank": place.first_rank,
        "host": place.host,
        "options": place.job,
        "secret": place.secret,
        "identity": place.identity,
    }
    return MachineGroup(place, lines, [job], [None], env, debug, PROGRAM, GRACE_S, hear).run()
