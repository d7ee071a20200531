"""The machine that a command runs on: kept awake, heard of when it sleeps all the same, and its network interfaces."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from mlx_distributed.cli.machine.interfaces import Interface, Kind, with_addresses
from mlx_distributed.cli.machine.mac import Mac

NETWORK = Path("/sys/class/net")


class Machine(Protocol):
    """What a worker wants of the machine that it runs on."""

    def awake(self) -> AbstractContextManager[None]:
        """While this lasts, the machine does not go to sleep by itself."""
        ...

    def on_sleep(self, will_sleep: Callable[[], None], woke: Callable[[], None]) -> AbstractContextManager[None]:
        """While this lasts, call `will_sleep` before the machine goes to sleep, which waits for its return, and `woke`
        when it is awake again; both in a thread of its own."""
        ...

    def interfaces(self) -> Sequence[Interface]:
        """That are up and have an address."""
        ...

    def on_battery(self) -> bool: ...


class Plain:
    """Linux. Its machines seldom sleep, so nothing is done about that: who falls silent is left out after 3 s."""

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def on_sleep(self, will_sleep: Callable[[], None], woke: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def interfaces(self) -> Sequence[Interface]:
        return with_addresses({path.name: _kind(path) for path in NETWORK.glob("*")})

    def on_battery(self) -> bool:
        return False


def this_machine() -> Machine:
    """The one that this process runs on."""
    return Mac() if sys.platform == "darwin" else Plain()


def _kind(folder: Path) -> Kind:
    """Of the interface that a folder of /sys/class/net is about."""
    if (folder / "wireless").exists():
        return "wifi"
    if folder.name.startswith("thunderbolt"):
        return "thunderbolt"
    return "ethernet" if (folder / "device").exists() else "unknown"
