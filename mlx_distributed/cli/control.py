"""The line between a command and a worker that it started: JSON objects, one a line, over a socket pair.

It carries the job, the addresses of the ranks, what rank 0 has to say and, at the end, the error. When it closes, the
other side is gone.
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
        self._unread = b""

    def send(self, **message: Any) -> None:
        """Send one message; does nothing when the other side is gone."""
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> dict[str, Any] | None:
        """The next message, None when the other side is gone."""
        while b"\n" not in self._unread:
            try:
                data = self._sock.recv(1 << 16)
            except OSError:
                return None
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return dict(json.loads(line))

    def heard(self, timeout_s: float) -> bool:
        """Whether something has come, or the other side has gone, within that time. To be followed by `receive`."""
        return b"\n" in self._unread or bool(select.select([self._sock], [], [], timeout_s)[0])

    def exchange(self, address: str) -> list[str]:
        """Tell the parent where this worker listens, and be told the addresses of all; from then on, end with it."""
        return list(self._ask(address=address)["addresses"])

    def enroll(self, **what: Any) -> str:
        """Tell the parent of an elastic run what was found out, and be told the address of the coordinator; from then
        on, end with it."""
        return str(self._ask(**what)["coordinator"])

    def _ask(self, **message: Any) -> dict[str, Any]:
        self.send(**message)
        answer = self.receive()
        if answer is None:
            os._exit(1)
        self.exit_with_parent()
        return answer

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
        self._sock.close()
