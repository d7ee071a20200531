"""A Mac: what its tools print, what its power manager sends, and, where this is one, the real thing."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_distributed.cli.machine import mac
from mlx_distributed.cli.machine.mac import CAN_SLEEP, HAS_POWERED_ON, WILL_SLEEP, Mac, is_on_battery, kinds

on_a_mac = pytest.mark.skipif(sys.platform != "darwin", reason="it calls the frameworks and tools of macOS")
elsewhere = pytest.mark.skipif(sys.platform == "darwin", reason="it is about a system without the tools of macOS")

PORTS = """
Hardware Port: Ethernet Adapter (en4)
Device: en4
Ethernet Address: 52:ed:3c:00:00:01

Hardware Port: USB 10/100/1000 LAN
Device: en7
Ethernet Address: 00:e0:4c:00:00:02

Hardware Port: Thunderbolt Ethernet Slot 1
Device: en8
Ethernet Address: 00:e0:4c:00:00:03

Hardware Port: Wi-Fi
Device: en0
Ethernet Address: 3c:22:fb:00:00:04

Hardware Port: Bluetooth PAN
Device: en6
Ethernet Address: 3c:22:fb:00:00:05

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:a1:0b:00:00:06

VLAN Configurations
===================
"""


def test_kinds_of_hardware_ports() -> None:
    assert kinds(PORTS) == {
        "en4": "ethernet",
        "en7": "ethernet",
        "en8": "ethernet",
        "en0": "wifi",
        "en6": "unknown",
        "bridge0": "thunderbolt",
    }
    assert kinds("") == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; discharging; 3:10 remaining\n", True),
        ("Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t80%; charging; 0:40 remaining\n", False),
        ("Now drawing from 'AC Power'\n", False),
        ("", False),
    ],
)
def test_on_battery(source: str, expected: bool) -> None:
    assert is_on_battery(source) is expected


class PowerManager:
    """In place of IOKit and Core Foundation: sends messages in the thread of a run loop, and hears the answers."""

    def __init__(self, connection: int = 7) -> None:
        self.said: list[object] = []
        self._connection = connection
        self._messages: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()

    def load(self) -> tuple[Any, Any, None]:
        kit = SimpleNamespace(
            IORegisterForSystemPower=self._register,
            IONotificationPortGetRunLoopSource=lambda port: 1,
            IOAllowPowerChange=lambda root, identity: self.said.append((root.value, identity)),
            IODeregisterForSystemPower=lambda notifier: self.said.append("deregistered"),
            IOServiceClose=lambda root: None,
            IONotificationPortDestroy=lambda port: None,
        )
        foundation = SimpleNamespace(
            CFRunLoopGetCurrent=lambda: 1,
            CFRunLoopAddSource=lambda loop, source, mode: None,
            CFRunLoopRunInMode=self._run,
            CFRunLoopStop=lambda loop: self._messages.put(None),
        )
        return kit, foundation, None

    def send(self, message: int, identity: int = 0) -> None:
        self._messages.put((message, identity))

    def _register(self, reference: None, port: object, callback: Any, notifier: object) -> int:
        self._callback = callback
        return self._connection

    def _run(self, mode: None, seconds: float, once: bool) -> None:
        while (message := self._messages.get()) is not None:
            self._callback(None, 0, *message)


def test_sleep_is_allowed_when_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, awake = PowerManager(), threading.Event()
    monkeypatch.setattr(mac, "_load", manager.load)

    def woke() -> None:
        manager.said.append("woke")
        awake.set()

    with Mac().on_sleep(lambda: manager.said.append("left"), woke):
        manager.send(CAN_SLEEP, 4)
        manager.send(WILL_SLEEP, 5)
        manager.send(HAS_POWERED_ON)
        assert awake.wait(10.0)
    assert manager.said == [(7, 4), "left", (7, 5), "woke", "deregistered"]


def test_without_a_power_manager_there_is_nothing_to_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = PowerManager(connection=0)
    monkeypatch.setattr(mac, "_load", manager.load)
    with Mac().on_sleep(pytest.fail, pytest.fail):
        pass
    assert manager.said == []


@elsewhere
def test_without_its_tools_a_mac_says_little() -> None:
    with Mac().awake():
        assert not Mac().on_battery()
    assert {interface.kind for interface in Mac().interfaces()} <= {"loopback", "unknown"}


@on_a_mac
def test_it_is_kept_awake_for_as_long_as_that_lasts() -> None:
    def said(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    with Mac().awake():
        tool = said("pgrep", "-P", str(os.getpid()), "caffeinate")
        while f"pid {tool}(caffeinate)" not in said("pmset", "-g", "assertions"):
            pass
    assert f"pid {tool}(caffeinate)" not in said("pmset", "-g", "assertions")


@on_a_mac
def test_it_hears_of_sleep_until_that_is_over() -> None:
    with Mac().on_sleep(pytest.fail, pytest.fail):
        assert "sleep-watch" in {thread.name for thread in threading.enumerate()}
    assert "sleep-watch" not in {thread.name for thread in threading.enumerate()}


@on_a_mac
def test_it_knows_its_interfaces() -> None:
    assert "loopback" in {interface.kind for interface in Mac().interfaces()}
    assert kinds(mac._ask("/usr/sbin/networksetup", "-listallhardwareports"))
