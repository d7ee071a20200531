"""A worker that does nothing but to say which signal has ended it."""

from __future__ import annotations

import signal
import socket
import sys

from mlx_distributed.cli.control import Control
from mlx_distributed.cli.interrupt import SIGNALS

if __name__ == "__main__":
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    control.receive()
    control.send(error=signal.Signals(signal.sigwait(SIGNALS)).name)
