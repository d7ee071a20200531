"""How the machines of a group find each other: each has a line over TLS to the first one.

Who joins knows that machine by the fingerprint in the join string before it shows the token, and is then told what the
group is to be: its ranks, what they do, and the key with which ranks know each other. The line stays; when it closes,
the other machine has gone.
"""

from __future__ import annotations

import hmac
import json
import queue
import secrets
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from mlx_distributed import __version__
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.elastic.crew import hostname
from mlx_distributed.cli.elastic.invitation import Invitation, new_token
from mlx_distributed.cli.meeting.place import LINE_S, Line, Place, What, ranks, word
from mlx_distributed.comm.tls import Identity
from mlx_distributed.errors import ConfigError, MlxDistributedError

WAIT_S = 600.0
"""So long the others may take to come."""
HELLO_S = 10.0
"""Who has connected and not said who it is by then is let go."""
MAX_STRANGERS = 16
"""That may be saying who they are at a time."""
MAX_HELLO_BYTES = 4096
POLL_S = 0.1


@dataclass(frozen=True)
class Guest:
    """A machine that has been let in."""

    control: Control
    name: str
    host: str
    """Address of the interface with which it reaches this machine."""
    num_workers: int

    def __str__(self) -> str:
        return f"{self.name} ({self.host})"


class Meeting:
    """Lets machines in, until there are enough workers.

    Args:
        listen: address of this machine that the others reach; port 0 takes a free one.
        what: the group gathers for.
        given: what stands before the address where a person has given it.

    Raises:
        ConfigError: it cannot be listened on.
    """

    def __init__(self, listen: str, what: What, given: str) -> None:
        self._what = what
        self._token, self._identity = new_token(), Identity.create(datetime.now(UTC))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as pem:  # Nobody else can read it; ssl reads only files.
            pem.write(self._identity.key + self._identity.certificate)
            pem.flush()
            self._context.load_cert_chain(pem.name)
        host, _, port = listen.rpartition(":")
        self.host = host
        bare = host.strip("[]")
        try:
            family = socket.AF_INET6 if ":" in bare else socket.AF_INET
            self._listener = socket.create_server((bare, int(port)), family=family)
        except OSError as error:
            raise ConfigError(
                f"{given}{listen}: cannot be listened on ({error.strerror}); give an address of this machine that "
                "the others reach, such as 192.168.1.20:4000, with a port that is free"
            ) from None
        self._guests: queue.SimpleQueue[Guest] = queue.SimpleQueue()
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        address = f"{host}:{self._listener.getsockname()[1]}"
        self.invitation = Invitation(address, self._token, self._identity.fingerprint, "group")

    def wait(
        self,
        num_here: int,
        num_workers: int,
        tell: Callable[[str], None],
        wait_s: float = WAIT_S,
        check: Callable[[], None] = lambda: None,
    ) -> list[Guest]:
        """Until all workers are here; returns the other machines in the order in which they came.

        Args:
            num_here: workers of this machine.
            num_workers: of the group.
            tell: is given a line for people where one comes or goes.
            wait_s: so long they may take.
            check: called meanwhile; what it raises ends the wait.

        Raises:
            MlxDistributedError: they have not come.
        """
        limit_s, here = time.monotonic() + wait_s, list[Guest]()
        self._listener.settimeout(POLL_S)
        while (present := num_here + sum(guest.num_workers for guest in here)) < num_workers:
            check()
            if time.monotonic() >= limit_s:
                names = ", ".join(["this machine", *map(str, here)])
                raise MlxDistributedError(
                    f"gave up after {wait_s:g} s: {present} of {num_workers} workers are here ({names}); see whether "
                    f"the others reach {self.invitation.address}, and start all of them again"
                )
            self._let_in()
            for guest in [guest for guest in here if guest.control.heard(0.0)]:  # Nothing else is due than its end.
                here.remove(guest)
                guest.control.close()
                tell(f"{guest} has gone")
            while not self._guests.empty():
                self._welcome(self._guests.get(), here, num_here, num_workers, tell)
        self._listener.close()
        while not self._guests.empty():
            self._welcome(self._guests.get(), here, num_here, num_workers, tell)
        return here

    def begin(self, job: Mapping[str, Any], num_here: int, guests: Sequence[Guest]) -> tuple[Place, list[Line]]:
        """Tell all guests what is to be done; returns the place of this machine, and the lines to the others."""
        machines = [f"{hostname()} ({self.host})"] * num_here
        for guest in guests:
            machines += [str(guest)] * guest.num_workers
        secret, identity = secrets.token_hex(16), asdict(self._identity)
        first_rank, lines = num_here, []
        for guest in guests:
            place = Place(first_rank, guest.num_workers, guest.host, machines, secret, identity, job)
            guest.control.send(**asdict(place))
            lines.append(Line(guest.control, f"{ranks(first_rank, guest.num_workers)}, {guest}"))
            first_rank += guest.num_workers
        return Place(0, num_here, self.host, machines, secret, identity, job), lines

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

    def _welcome(
        self, guest: Guest, here: list[Guest], num_here: int, num_workers: int, tell: Callable[[str], None]
    ) -> None:
        present = num_here + sum(other.num_workers for other in here)
        room = num_workers - present
        if guest.num_workers > room:
            rest = f"there is room for {room}; use --nproc {room}" if room else "all are here"
            guest.control.send(refused=f"it brings {guest.num_workers} workers, and of {num_workers} {rest}")
            guest.control.close()
            tell(f"{guest} is turned away: it brings {guest.num_workers} workers, and there is room for {room}")
            return
        guest.control.send(welcome=True)
        here.append(guest)
        tell(f"{guest} is here, {present + guest.num_workers} of {num_workers}")

    def _let_in(self) -> None:
        try:
            plain, _ = self._listener.accept()
        except TimeoutError:
            return
        if not self._strangers.acquire(blocking=False):
            plain.close()
            return
        threading.Thread(target=self._greet, args=(plain,), name="greet", daemon=True).start()

    def _greet(self, plain: socket.socket) -> None:
        """Find out who has come, in a thread of its own."""
        try:
            plain.settimeout(HELLO_S)
            line = self._context.wrap_socket(plain, server_side=True)
            hello = _hello(line)
            if hello is None or not hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
                line.close()
                return
            control, refusal = Control(line), self._refusal(hello)
            line.settimeout(LINE_S)
            if refusal:
                control.send(**refusal)
                control.close()
            else:
                names = word(hello.get("name")), word(hello.get("host"))
                self._guests.put(Guest(control, *names, int(hello["num_workers"])))
        except OSError:  # TLS that it does not speak, silence, or it has gone.
            plain.close()
        finally:
            self._strangers.release()

    def _refusal(self, hello: Mapping[str, Any]) -> dict[str, str] | None:
        if hello.get("program_version") != __version__:
            return {"program_version": __version__}
        if hello.get("what") != self._what:
            how = "mlx-train --join" if self._what == "run" else "mlx-distributed bench join"
            return {"refused": f"it is a {self._what}; use {how}"}
        if hello.get("mlx_version") != version("mlx"):
            theirs = f"MLX {word(hello.get('mlx_version'))} there and {version('mlx')} here"
            return {"refused": f"{theirs}: the same bits are promised within one version only; install that one"}
        num_workers = hello.get("num_workers")
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
            return {"refused": "it brings no workers"}
        return None


def _hello(line: ssl.SSLSocket) -> dict[str, Any] | None:
    """What a stranger says first, None where that is nothing that we know."""
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_HELLO_BYTES:
        more = line.recv(MAX_HELLO_BYTES - len(data))
        if not more:
            return None
        data += more
    try:
        hello = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return hello if isinstance(hello, dict) else None
