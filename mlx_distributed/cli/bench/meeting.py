"""How the ranks of a benchmark on several machines find each other: each has a line over TLS to the machine of rank 0.

Who joins knows that machine by the fingerprint in the join string before it shows the token, and is then told what the
group is to be: its rank, the options, and the key with which the ranks know each other. The line stays; when it closes,
the other machine has gone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import queue
import secrets
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from mlx_distributed import __version__
from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.elastic.crew import hostname
from mlx_distributed.cli.elastic.invitation import Invitation, new_token
from mlx_distributed.cli.elastic.reach import reach
from mlx_distributed.comm.tls import Identity
from mlx_distributed.errors import ConfigError, MlxDistributedError

WAIT_S = 600.0
"""So long the others may take to come."""
LINE_S = 60.0
"""So long a line may be silent where something is due."""
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


class Meeting:
    """Lets machines in, until there are enough.

    Args:
        listen: address of this machine that the others reach; port 0 takes a free one.

    Raises:
        ConfigError: it cannot be listened on.
    """

    def __init__(self, listen: str) -> None:
        self._token, self._identity = new_token(), Identity.create(datetime.now(UTC))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile(
            "w", suffix=".pem"
        ) as pem:  # Nobody else can read it, and ssl reads only files.
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
                f"--listen {listen}: cannot be listened on ({error.strerror}); give an address of this machine that "
                "the others reach, such as 192.168.1.20:4000, with a port that is free"
            ) from None
        self._guests: queue.SimpleQueue[Guest] = queue.SimpleQueue()
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self.invitation = Invitation(
            f"{host}:{self._listener.getsockname()[1]}", self._token, self._identity.fingerprint
        )  # fmt: skip

    def wait(self, num_guests: int, tell: Callable[[str], None], wait_s: float = WAIT_S) -> list[Guest]:
        """Until so many machines are here.

        Args:
            num_guests: besides this machine.
            tell: is given a line for people where one comes or goes.
            wait_s: so long they may take.

        Raises:
            MlxDistributedError: they have not come.
        """
        limit_s, here = time.monotonic() + wait_s, list[Guest]()
        self._listener.settimeout(POLL_S)
        while len(here) < num_guests:
            if time.monotonic() >= limit_s:
                names = ", ".join(["this machine", *(guest.name for guest in here)])
                raise MlxDistributedError(
                    f"gave up after {wait_s:g} s: {len(here) + 1} of {num_guests + 1} workers are here ({names}); see "
                    f"whether the others reach {self.invitation.address}, and start all of them again"
                )
            self._let_in()
            while not self._guests.empty():
                here.append(self._guests.get())
                tell(f"{here[-1].name} ({here[-1].host}) is here, {len(here) + 1} of {num_guests + 1}")
            for guest in [guest for guest in here if guest.control.heard(0.0)]:  # Nothing else is due than its end.
                here.remove(guest)
                guest.control.close()
                tell(f"{guest.name} ({guest.host}) has gone")
        self._listener.close()
        while not self._guests.empty():
            here.append(self._guests.get())
        for guest in here[num_guests:]:
            guest.control.close()
        return here[:num_guests]

    def begin(self, options: Options, guests: list[Guest]) -> dict[str, object]:
        """Tell all guests what is measured; returns what rank 0 is to be told."""
        same = {"options": asdict(options), "secret": secrets.token_hex(16), "identity": asdict(self._identity)}
        for rank, guest in enumerate(guests, 1):
            guest.control.send(rank=rank, host=guest.host, **same)
        return {"rank": 0, "host": self.host, **same}

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

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
            control = Control(line)
            line.settimeout(LINE_S)
            if hello.get("program_version") == __version__:
                control.send(welcome=True)
                self._guests.put(Guest(control, str(hello.get("name"))[:64], str(hello.get("host"))[:64]))
            else:
                control.send(program_version=__version__)
                control.close()
        except OSError:  # TLS that it does not speak, silence, or it has gone.
            plain.close()
        finally:
            self._strangers.release()


def come(text: str) -> tuple[Control, dict[str, Any]]:
    """Join the benchmark of another machine; returns the line to it, and what this rank is told when all are there.

    Args:
        text: the join string.

    Raises:
        ConfigError: the string is of no use, or of something else.
        MlxDistributedError: nobody answers, or the other machine has given up.
    """
    invitation = Invitation.decode(text)
    local_host, address = reach(invitation).local_host, invitation.address
    line = _dial(invitation)
    control = Control(line)
    try:
        control.send(token=invitation.token, program_version=__version__, name=hostname(), host=local_host)
        answer = control.receive() or {}
        if "program_version" in answer:
            raise ConfigError(
                f"the benchmark at {address} is of mlx-distributed {answer['program_version']}, and this is "
                f"{__version__}: install that version here"
            )
        if "welcome" not in answer:
            raise ConfigError(
                f"who listens on {address} lets nobody into a benchmark with this join string; take the one that "
                "mlx-distributed bench has printed; that of a run is for mlx-train --join"
            )
        line.settimeout(WAIT_S + LINE_S)
        job = control.receive()
        if job is None:
            raise MlxDistributedError(f"the benchmark at {address} has ended before all workers were there")
    except BaseException:
        control.close()
        raise
    line.settimeout(LINE_S)
    return control, job


def _dial(invitation: Invitation) -> ssl.SSLSocket:
    """A line to the machine that has shown its certificate a moment ago, and must show it again."""
    host, _, port = invitation.address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        line = context.wrap_socket(socket.create_connection((host.strip("[]"), int(port)), HELLO_S))
    except OSError as error:
        raise MlxDistributedError(
            f"the benchmark at {invitation.address} has gone ({error.strerror or error}); start all of it again"
        ) from None
    if hashlib.sha256(line.getpeercert(binary_form=True) or b"").hexdigest() != invitation.fingerprint:
        line.close()
        raise ConfigError(f"who listens on {invitation.address} shows two certificates; use a new join string")
    return line


def _hello(line: ssl.SSLSocket) -> dict[str, object] | None:
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
