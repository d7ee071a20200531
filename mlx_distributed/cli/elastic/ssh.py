"""Workers on other machines, started over SSH by the client of the system.

Each host runs `mlx-train --join - --attended` in the login shell of its user, as any other shell of macOS finds neither
Homebrew nor `~/.local/bin`. The join string goes over standard input, and only when that program has said that it is
there. Ctrl-C is told in the same way; a connection that is lost ends nothing (`attended`).
"""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from mlx_distributed.cli.elastic.attended import READY
from mlx_distributed.cli.elastic.hostfile import Host
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.local import MAX_INTERRUPTS
from mlx_distributed.errors import ConfigError

CONNECT_S, ALIVE_S, NUM_ALIVE = 10, 10, 3
"""So long to connect may take; a connection is lost when nothing has come `NUM_ALIVE` times after `ALIVE_S`."""
OPTIONS = (
    "-T",
    *("-o", "BatchMode=yes"),  # It must not ask for a password: several at once would.
    *("-o", f"ConnectTimeout={CONNECT_S}"),
    *("-o", f"ServerAliveInterval={ALIVE_S}"),
    *("-o", f"ServerAliveCountMax={NUM_ALIVE}"),
    *("-o", "ClearAllForwardings=yes"),
)
CANNOT_CONNECT, NOT_EXECUTABLE, NOT_FOUND = 255, 126, 127
"""Exit status of ssh, and of a shell."""
POLL_S = 0.05
LAST_S = 10.0
"""So long after the end of the run a worker may take to end by itself; one that has come too late does not."""
GO_ON = "the others go on without it. When that is mended, run mlx-train --join there, with the join string above"
"""What becomes of an elastic run where a host cannot take part."""
NUM_LAST_WORDS = 2
"""Lines of what was said before a failure that are repeated; the last ones say why."""


def remote_command(program: str, arguments: Sequence[str], cwd: str | None) -> str:
    """A command line for the shell of another machine, whichever that is.

    Args:
        program: as a person types it there; `~` and `$VARIABLES` mean what they mean there.
        arguments: of the program, taken as they are.
        cwd: folder there; relative to the home folder, which None is.
    """
    line = f"{program} {shlex.join(arguments)}"
    if cwd is not None:
        folder = cwd if cwd.startswith("/") else f"./{cwd.removeprefix('~/')}"
        line = f"cd {shlex.quote(folder)} && {line}"
    return f'exec "$SHELL" -lc {shlex.quote(line)}'


def folder_for(run_id: str, host: str) -> str:
    """Where the worker of a host writes: of its own, as machines may share a home folder."""
    return f"runs/joined-{run_id[:8]}-{re.sub('[^A-Za-z0-9.-]', '-', host)}"


def address_towards(ssh: Sequence[str], hosts: Sequence[Host]) -> str | None:
    """Address of the interface of this machine by which hosts are reached; None where that cannot be found out.

    The first host decides to which a way is found; the way to this machine itself is taken where there is no other.

    Args:
        ssh: the client.
        hosts: that are to reach this machine.
    """
    loopback = None
    for host in hosts:
        address = _source_address(host.ips[0] if host.ips else _hostname(ssh, host.name))
        if address is not None and not address.startswith(("127.", "[::1]")):
            return address
        loopback = loopback or address
    return loopback


def listen_towards(ssh: Sequence[str], hosts: Sequence[Host], key: str) -> str:
    """Where to listen for hosts that were not told: a free port on the interface by which they are reached.

    Args:
        ssh: the client.
        hosts: that are to reach this machine.
        key: of the configuration that says so.

    Raises:
        ConfigError: that cannot be found out.
    """
    address = address_towards(ssh, hosts)
    if address is None:
        raise ConfigError(
            f"by which address {', '.join(each.name for each in hosts)} reach this machine cannot be told, as it knows "
            f"no way to them; set it, as in {key}=192.168.1.20:4000"
        )
    return f"{address}:0"


def _hostname(ssh: Sequence[str], name: str) -> str:
    """What a name stands for in the configuration of ssh."""
    asked = subprocess.run([*ssh, "-G", "--", name], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = re.search(r"^hostname (.+)$", asked.stdout, re.MULTILINE)
    return found[1] if found else name


def _source_address(host: str) -> str | None:
    with contextlib.suppress(OSError, UnicodeError):  # No such name, or no name at all.
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 22, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # Sends nothing.
                source: str = probe.getsockname()[0]
                if not source.startswith("fe80:"):  # Means something else on every machine.
                    return f"[{source}]" if ":" in source else source
    return None


def ending(
    host: str, program: str, status: int, started: bool, words: Sequence[str], told: bool, outlook: str = GO_ON
) -> str | None:
    """What is to be said of the end of a remote worker, in a paragraph; None where all is well or has been said.

    Args:
        host: as it was named.
        program: as it was to be started there.
        status: exit status of ssh: that of the program, or 255.
        started: the program was there.
        words: lines that were printed before it started, or last.
        told: the program has said itself what was wrong.
        outlook: what becomes of the run where the host cannot take part.
    """
    why = "; ".join(list(filter(None, map(str.strip, words)))[-NUM_LAST_WORDS:]) or "no reason was given"
    if status in (0, INTERRUPTED):
        return None
    if status == CANNOT_CONNECT and started:
        return f"{host}: the connection was lost ({why}); its worker goes on, for as long as it reaches this machine"
    later = f"; {outlook}"
    if status == CANNOT_CONNECT:
        return (
            f"{host}: ssh cannot connect ({why}); it must get in without being asked, so that `ssh {host}` works{later}"
        )
    if status in (NOT_FOUND, NOT_EXECUTABLE) and not started:
        return (
            f"{host}: the login shell there does not find {program!r} ({why}); install mlx-distributed there, or say "
            f"how it is started, as in --remote-command 'uv run --project ~/mlx-distributed mlx-train'{later}"
        )
    return None if told else f"{host}: {program!r} ended with status {status} ({why}){later}"


class Remotes:
    """Workers on other machines, from `start` to `close`.

    Args:
        commands: that run ssh, by the name of the host.
        program: of the worker, as it is started there.
        outlook: as of `ending`.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], program: str, outlook: str = GO_ON) -> None:
        self._commands, self._program, self._outlook = commands, program, outlook
        self._remotes: list[_Remote] = []

    def start(self, join_string: str) -> None:
        """Start them all."""
        for host, command in self._commands.items():
            self._remotes.append(_Remote(host, command, self._program, join_string, self._outlook))

    @property
    def may_train(self) -> bool:
        """Whether any of them may take part, now or later."""
        return any(remote.may_train for remote in self._remotes)

    @property
    def all_may_train(self) -> bool:
        """Likewise, all of them."""
        return all(remote.may_train for remote in self._remotes)

    def close(self, over: bool) -> None:
        """Wait for the end of all that can be told to end. Ctrl-C tells them once more, and in the end gives up.

        Args:
            over: the run is, and so all end by themselves.
        """
        for remote in self._remotes:
            remote.over = over
        deadline_s = time.monotonic() + (LAST_S if over else 0.0)
        num_told = num_interrupts = 0
        while not all(remote.ended.is_set() for remote in self._remotes):
            try:
                if num_told < num_interrupts or (not num_told and time.monotonic() >= deadline_s):
                    num_told += 1
                    for remote in self._remotes:
                        remote.interrupt(at_once=num_told > MAX_INTERRUPTS)
                for remote in self._remotes:
                    remote.ended.wait(POLL_S)
            except KeyboardInterrupt:
                num_interrupts = num_told + 1


class _Remote:
    """The worker of one host. A thread passes on what it says, and has the last word."""

    def __init__(self, host: str, command: Sequence[str], program: str, join_string: str, outlook: str) -> None:
        self._host, self._program, self._join_string, self._outlook = host, program, join_string, outlook
        # In a session of its own: Ctrl-C is for us, and passed on in good order.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
            bufsize=1,
        )
        self.over = False
        """The run is: what goes wrong from now on is of no importance."""
        self._started = self._lost = False
        self.ended = (
            threading.Event()
        )  # After a Ctrl-C in its `join`, Python 3.11 takes a thread for one that has ended.
        threading.Thread(target=self._follow, name=f"ssh {host}", daemon=True).start()

    @property
    def may_train(self) -> bool:
        return self._lost or not self.ended.is_set()

    def interrupt(self, at_once: bool) -> None:
        """Ctrl-C there; or give up the connection."""
        if at_once:
            self._process.kill()
        else:
            self._send("")

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # Nobody is there any more; ValueError says that it is closed.
            self._process.stdin.write(f"{line}\n")

    def _follow(self) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        words: list[str] = []
        told = False
        for line in map(str.rstrip, stdout):
            words = [*words, line][-NUM_LAST_WORDS:]
            if not self._started:
                if line == READY:
                    self._started, words = True, []
                    self._send(self._join_string)
                    _print(f"{self._host}: joins", sys.stdout)
            elif line.startswith("error: ") and not self.over:
                told = True
                _print(f"error: {self._host}: {line.removeprefix('error: ')}", sys.stderr)
            else:
                _print(f"{self._host}: {line}", sys.stdout)
        status = self._process.wait()
        stdout.close()
        with contextlib.suppress(OSError):
            stdin.close()
        self._lost = status == CANNOT_CONNECT and self._started
        paragraph = ending(self._host, self._program, status, self._started, words, told, self._outlook)
        if paragraph and not self.over:
            _print(f"error: {paragraph}", sys.stderr)
        self.ended.set()


def _print(line: str, stream: TextIO) -> None:
    """In one piece, as others print too. Nobody has to be listening."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{line}\n")
        stream.flush()
