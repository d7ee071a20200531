"""The network interfaces of this machine: their addresses, the one that a name stands for, and which is the better."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_distributed.errors import ConfigError

Kind = Literal["wifi", "ethernet", "thunderbolt", "loopback", "unknown"]

CABLES: tuple[Kind, ...] = ("thunderbolt", "ethernet")
"""The fastest first."""

# Of <sys/sockio.h> and <linux/sockios.h>. Both put the IPv4 address of an interface at the same place.
_SIOCGIFADDR = 0xC0206921 if sys.platform == "darwin" else 0x8915
_REQUEST, _ADDRESS = struct.Struct("16s24x"), slice(20, 24)


@dataclass(frozen=True)
class Interface:
    """A network interface that is up and has an IPv4 address."""

    name: str
    address: str
    kind: Kind = "unknown"


def with_addresses(kinds: Mapping[str, Kind]) -> list[Interface]:
    """The interfaces of this machine that have an IPv4 address.

    Args:
        kinds: of interfaces, by name.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, _REQUEST.pack(name.encode()))
            except OSError:
                continue  # It has none.
            address = socket.inet_ntoa(answer[_ADDRESS])
            kind = "loopback" if address.startswith("127.") else kinds.get(name, "unknown")
            found.append(Interface(name, address, kind))
    return found


def resolve(listen: str, interfaces: Sequence[Interface], key: str = "elastic.listen") -> str:
    """`listen` with the address of an interface in place of its name; as it is where its host is an address or the name
    of a host.

    Args:
        listen: host and port, as in `en5:4000`.
        interfaces: of this machine.
        key: of the configuration, for the error.

    Raises:
        ConfigError: the host is neither.
    """
    host, _, port = listen.rpartition(":")
    for interface in interfaces:
        if interface.name == host:
            return f"{interface.address}:{port}"
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):
        known = ", ".join(f"{interface.name} ({interface.address})" for interface in interfaces)
        raise ConfigError(
            f"{key}={listen}: {host} is neither a host that can be found nor an interface of this machine "
            f"with an IPv4 address; those are {known or 'none'}"
        ) from None
    return listen


def address_of(host: str) -> str:
    """IPv4 address of a host; the host itself where it has none."""
    try:
        return socket.gethostbyname(host)
    except (OSError, UnicodeError):
        return host


def advice(address: str, interfaces: Sequence[Interface], on_battery: bool) -> list[str]:
    """What slows a run down or breaks it off, and can be mended: a line each.

    Args:
        address: of this machine, at which other workers reach it; host alone.
        interfaces: of this machine.
        on_battery: whether it runs on battery.
    """
    lines = []
    wireless = [interface.name for interface in interfaces if (interface.address, interface.kind) == (address, "wifi")]
    cables = [interface for kind in CABLES for interface in interfaces if interface.kind == kind]
    if wireless and cables:
        lines.append(
            f"other workers reach this machine over Wi-Fi ({wireless[0]}), though it has {cables[0].kind}; if that "
            f"reaches them too, set elastic.listen={cables[0].name}:0, also beside --join"
        )
    if on_battery:
        lines.append("this machine runs on battery, and may sleep while it trains; connect it to power")
    return lines
