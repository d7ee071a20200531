"""`mlx-train --join - --attended`: a worker that another machine has started, and looks after over standard input.

Standard input brings the join string, where no list of processes shows it; every further line is a Ctrl-C. A connection
that is lost ends nothing: a worker lives as long as its run, and it is the coordinator that knows who takes part. Where
both are gone for `elastic.coordinator_grace_s`, nobody is left who could ever end this worker: it ends, as at a Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from mlx_distributed.elastic.membership import Contact
from mlx_distributed.errors import ConfigError, TrainingError

READY = "mlx-train is ready to join"
"""Printed first, for who waits with the join string: what has come before is not of this program."""
ASK_S = 1.0
"""So often a worker that nobody looks after asks for the coordinator."""


def read_line(fd: int) -> str:
    """One line, and no byte of the next."""
    line = bytearray()
    while (byte := os.read(fd, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace")


class Attendance:
    """Listens to who looks after this command, from now on.

    Args:
        fd: standard input, of which the first line has been read.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lost = threading.Event()
        self._asked_s = self._answered_s = 0.0
        threading.Thread(target=self._listen, name="attendance", daemon=True).start()

    def is_over(self, coordinator: Contact, grace_s: float) -> bool:
        """Whether nobody needs this worker any more.

        Args:
            coordinator: of the run; it is asked, now and then.
            grace_s: for so long it must not have answered.
        """
        now_s = time.monotonic()
        if not self._lost.is_set():
            self._answered_s = now_s
        elif now_s - self._asked_s >= ASK_S:
            self._asked_s = now_s
            try:
                coordinator.status()
                self._answered_s = now_s
            except (ConfigError, TrainingError):  # Nobody there, or another run.
                return now_s - self._answered_s >= grace_s
        return False

    def _listen(self) -> None:
        # Not through sys.stdin, of which a thread would hold the lock when Python ends.
        try:
            while data := os.read(self._fd, 1 << 10):
                for _ in range(data.count(b"\n")):
                    os.kill(os.getpid(), signal.SIGINT)
        except OSError:
            pass  # As at the end: nobody is there.
        # What is printed from now on must not fail.
        with open(os.devnull, "wb") as devnull:  # noqa: PTH123  # of its number, nothing else
            for stream in (sys.stdout, sys.stderr):
                os.dup2(devnull.fileno(), stream.fileno())
        self._lost.set()
