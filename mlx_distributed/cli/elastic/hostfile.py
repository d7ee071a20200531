"""The machines that a run is launched on: a list, or a hostfile as `mlx.launch` reads it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_distributed.errors import ConfigError

_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
_WITH_PORT = re.compile(r"[^:]+:[0-9]+")


class Host(NamedTuple):
    """One machine."""

    name: str
    """As ssh takes it: a name or an address, or one from its configuration; `user@` may stand before it."""
    ips: tuple[str, ...] = ()
    """Of the interfaces over which it is to be reached; empty where ssh knows best."""

    @property
    def is_here(self) -> bool:
        """Whether this machine is meant."""
        here = socket.gethostname().lower()
        short = here.partition(".")[0]
        return self.name.lower() in {"localhost", "127.0.0.1", "::1", here, short, f"{short}.local"}


def parse_hosts(text: str) -> list[Host]:
    """Of `a,user@b,192.168.1.7`.

    Raises:
        ConfigError: a name cannot be one, or stands there twice.
    """
    return _checked("--hosts", [Host(name.strip()) for name in text.split(",")])


def read_hostfile(path: Path) -> list[Host]:
    """Of JSON: a list of objects with `ssh` (a name) and perhaps `ips`, or an object with such a list as `hosts`.

    What else `mlx.launch` finds there (`rdma`, `backend`, `envs`) is for MLX's own backends, and not looked at.

    Raises:
        ConfigError: it cannot be read, or names no machine that could be one.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        entries = plain["hosts"] if isinstance(plain, dict) else plain
        hosts = [Host(str(entry["ssh"]), tuple(map(str, entry.get("ips", ())))) for entry in entries]
    except OSError as error:
        raise ConfigError(f"--hostfile={path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"--hostfile={path} is not a hostfile: it must be JSON, a list of objects such as "
            '{"ssh": "studio.local", "ips": ["192.168.1.20"]}, of which "ips" may be left out'
        ) from None
    return _checked(f"--hostfile={path}", hosts)


def _checked(source: str, hosts: Sequence[Host]) -> list[Host]:
    names: set[str] = set()
    for name, _ in hosts:
        if _WITH_PORT.fullmatch(name):
            raise ConfigError(
                f"{source}: {name} has a port, which ssh takes from its configuration: write a Host section with a "
                "Port into ~/.ssh/config, or, where all hosts have the same, give --ssh 'ssh -p PORT'"
            )
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{source}: {name!r} is not the name of a host; give names or addresses as ssh takes them, "
                "such as studio.local, ada@192.168.1.7 or a Host of ~/.ssh/config"
            )
        if name in names:
            raise ConfigError(
                f"{source}: {name} is named twice; name every machine once. For two workers on each there is "
                "--remote-command 'mlx-train --nproc 2'"
            )
        names.add(name)
    if not names:
        raise ConfigError(f"{source} names no machine")
    return list(hosts)
