"""Ctrl-C and SIGTERM: the first asks for a stop, after which there is something to save; a second one ends at once."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Handles SIGINT and SIGTERM of this process from now on, those that came while they were blocked too."""

    def __init__(self) -> None:
        self.requested = False
        self.terminated = False
        """It was SIGTERM that asked: this process is to end, whatever becomes of the run."""
        self.training = False
        """There is something to save between steps; set by the run. Otherwise the first signal ends at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            raise KeyboardInterrupt
        if self.requested:
            raise KeyboardInterrupt(
                "interrupted twice: ended without saving; --resume goes on from the last checkpoint"
            )
        self.terminated = number == signal.SIGTERM
        self.requested = True
