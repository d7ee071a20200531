"""A benchmark whose ranks are on several machines, each started by a command of its own there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mlx_distributed.cli.bench.meeting import Meeting, come
from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.bench.report import Report
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.local import LocalGroup, worker_environment
from mlx_distributed.errors import MlxDistributedError

PROGRAM = "mlx_distributed.cli.bench.rank"
GRACE_S = 5.0
"""A rank inside the ring has no deadline; when another one has gone, it is ended after this."""


class Line(NamedTuple):
    """To another machine."""

    control: Control
    who: str


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
    guests = meeting.wait(options.num_ranks - 1, tell)
    lines = [Line(guest.control, f"rank {rank}, {guest.name} ({guest.host})") for rank, guest in enumerate(guests, 1)]
    for who in (f"rank 0, this machine ({meeting.host})", *(line.who for line in lines)):
        tell(who)
    report.begin()
    job = meeting.begin(options, guests)

    def exchange(address: str) -> list[str]:
        addresses = [address]
        for line in lines:
            message = line.control.receive() or {"error": "it has gone, or not answered"}
            if "error" in message:
                raise MlxDistributedError(f"{line.who}: {message['error']}")
            addresses.append(str(message["address"]))
        for line in lines:
            line.control.send(addresses=addresses)
        return addresses

    return _OneOfThem(job, lines, exchange, report.hear, debug).run()


def join(text: str, debug: bool) -> int:
    """Be a rank of the benchmark of another machine; returns the exit status.

    Args:
        text: the join string.
        debug: have the rank print tracebacks.

    Raises:
        ConfigError: the string is of no use.
        MlxDistributedError: the other machine is not there, or has given up.
    """
    control, job = come(text)
    print(f"rank {job['rank']} of {job['options']['num_ranks']}; rank 0 shows the figures", flush=True)

    def exchange(address: str) -> list[str]:
        control.send(address=address)
        answer = control.receive()
        if answer is None or "addresses" not in answer:
            raise MlxDistributedError("rank 0 has ended before the group was made; it says why")
        return list(answer["addresses"])

    return _OneOfThem(job, [Line(control, "rank 0")], exchange, lambda message: None, debug).run()


class _OneOfThem(LocalGroup):
    """The rank of this machine; the lines to those of the others are closed when it has ended.

    Args:
        job: what it is told.
        lines: to other machines; when one closes, a rank has gone.
        exchange: told the address of this rank, gives those of all; may raise MlxDistributedError.
        hear: is given what the rank says.
        debug: have it print tracebacks.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        lines: Sequence[Line],
        exchange: Callable[[str], list[str]],
        hear: Callable[[Mapping[str, Any]], None],
        debug: bool,
    ) -> None:
        env, _ = worker_environment(os.environ, sys.platform)  # no hint: nothing here multiplies matrices
        self._lines, self._exchange = lines, exchange
        self._gone = ""
        """Whose line was closed first."""
        super().__init__([job], [None], env, debug, PROGRAM, GRACE_S, hear)

    def close(self) -> None:
        super().close()
        for line in self._lines:
            line.control.close()

    def _introduce(self) -> bool:
        (worker,) = self._workers
        message = worker.control.receive() or {}
        worker.error = message.get("error")
        if "address" in message:
            try:
                worker.control.send(addresses=self._exchange(message["address"]))
                return True
            except MlxDistributedError as error:
                worker.error = str(error)
        for line in self._lines:
            line.control.send(error=worker.error or "its rank has ended")
        worker.control.hang_up()
        return False

    def _has_failed(self) -> bool:
        gone = [line.who for line in self._lines if line.control.heard(0.0)]  # Nothing is due but its end.
        self._gone = self._gone or ", ".join(gone)
        return bool(gone) or super()._has_failed()

    def _report(self) -> int:
        (worker,) = self._workers
        if worker.dismissed and worker.error is None:
            worker.error = f"{self._gone} has gone in the middle of a measurement"
        return super()._report()
