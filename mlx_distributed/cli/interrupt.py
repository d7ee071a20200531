"""Ctrl-C: the first asks for a stop after the step under way, which is then saved; before training it ends at once."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """Handles SIGINT and SIGTERM of this process from now on."""

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        """Between steps there is something to save; set by the run."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.training:
            raise KeyboardInterrupt
        self.requested = True
