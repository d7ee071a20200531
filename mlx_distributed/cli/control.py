"""The line between `mlx-train` and a worker that it started: JSON objects, one a line, over a socket pair.

It carries the job, the addresses of the ranks and, at the end, the error. When it closes, the other side is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from typing import Any


class Control:
    """One end of the line."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("r", encoding="utf-8")

    def send(self, **message: Any) -> None:
        """Send one message; does nothing when the other side is gone."""
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> dict[str, Any] | None:
        """The next message, None when the other side is gone."""
        try:
            line = self._file.readline()
        except OSError:
            return None
        return dict(json.loads(line)) if line.endswith("\n") else None

    def heard(self, timeout_s: float) -> bool:
        """Whether something has come, or the other side has gone, within that time. To be followed by `receive`."""
        return bool(select.select([self._sock], [], [], timeout_s)[0])

    def exit_with_parent(self) -> None:
        """End this process at once when the other side is gone, however it went: nobody would stop it otherwise."""

        def watch() -> None:
            while self.receive() is not None:
                pass
            os._exit(1)

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()

    def hang_up(self) -> None:
        """Tell the other side that nothing more will come; what it still sends can be received."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._file.close()
        self._sock.close()
