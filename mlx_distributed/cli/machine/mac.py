"""What is special about a Mac: `caffeinate`, the messages of its power manager, `networksetup` and `pmset`.

Everything here is Apple's documented interface: caffeinate(8), networksetup(8), pmset(1), IORegisterForSystemPower of
IOKit/pwr_mgt/IOPMLib.h, and the run loops of Core Foundation.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, CFUNCTYPE, byref, c_double, c_int32, c_ssize_t, c_ubyte, c_uint32, c_void_p
from typing import Any

from mlx_distributed.cli.machine.interfaces import Interface, Kind, with_addresses

# Of IOKit/IOMessage.h.
CAN_SLEEP, WILL_SLEEP, HAS_POWERED_ON = 0xE0000270, 0xE0000280, 0xE0000300

FRAMEWORKS = "/System/Library/Frameworks/{0}.framework/{0}"
LOOK_S = 1.0
"""So often the thread that hears of sleep looks whether it is to end."""
ANSWER_S = 5.0
"""So long a tool of the system may take to answer."""

# IOServiceInterestCallback: given a reference, a service, a message and its argument.
_Callback = CFUNCTYPE(None, c_void_p, c_uint32, c_uint32, c_void_p)


class Mac:
    """A machine with macOS."""

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Against idle sleep, and on mains power against any but that of a lid that shuts; `pmset -g assertions` shows
        it. Ends with this process, however that ends."""
        try:
            tool = subprocess.Popen(["/usr/bin/caffeinate", "-i", "-s", "-w", str(os.getpid())])
        except OSError:
            yield  # It may sleep then; the run goes on when it wakes.
            return
        try:
            yield
        finally:
            tool.terminate()
            tool.wait()

    @contextmanager
    def on_sleep(self, will_sleep: Callable[[], None], woke: Callable[[], None]) -> Iterator[None]:
        """As of `Machine`."""
        kit, foundation, mode = _load()
        port, notifier, root = c_void_p(), c_uint32(), c_uint32()

        @_Callback
        def hear(_: int | None, service: int, message: int, argument: int | None) -> None:
            try:
                heed(message, will_sleep, woke)
            finally:
                if message in (CAN_SLEEP, WILL_SLEEP):  # Otherwise the machine waits for 30 s.
                    kit.IOAllowPowerChange(root, argument or 0)

        root.value = kit.IORegisterForSystemPower(None, byref(port), hear, byref(notifier))
        if not root.value:
            yield  # It is given up after 3 s of silence then, as any other.
            return
        over, loop = threading.Event(), c_void_p()

        def listen() -> None:
            loop.value = foundation.CFRunLoopGetCurrent()
            foundation.CFRunLoopAddSource(loop, kit.IONotificationPortGetRunLoopSource(port), mode)
            while not over.is_set():
                foundation.CFRunLoopRunInMode(mode, LOOK_S, False)

        thread = threading.Thread(target=listen, name="sleep-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            if loop.value:
                foundation.CFRunLoopStop(loop)
            thread.join()
            kit.IODeregisterForSystemPower(byref(notifier))
            kit.IOServiceClose(root)
            kit.IONotificationPortDestroy(port)

    def interfaces(self) -> Sequence[Interface]:
        return with_addresses(kinds(_ask("/usr/sbin/networksetup", "-listallhardwareports")))

    def on_battery(self) -> bool:
        return is_on_battery(_ask("/usr/bin/pmset", "-g", "batt"))


def heed(message: int, will_sleep: Callable[[], None], woke: Callable[[], None]) -> None:
    """Do what a message of the power manager is the occasion for."""
    if message == WILL_SLEEP:
        will_sleep()
    elif message == HAS_POWERED_ON:
        woke()


def kinds(ports: str) -> dict[str, Kind]:
    """Of interfaces, by name, as `networksetup -listallhardwareports` lists them: `Hardware Port: Wi-Fi`, then
    `Device: en0`."""
    found: dict[str, Kind] = {}
    port = ""
    for line in ports.splitlines():
        label, _, value = line.partition(": ")
        if label == "Hardware Port":
            port = value.lower()
        elif label == "Device":
            found[value] = _kind(port)
    return found


def is_on_battery(source: str) -> bool:
    """What `pmset -g batt` says in its first line: `Now drawing from 'Battery Power'`, or `'AC Power'`."""
    return "'Battery Power'" in source.partition("\n")[0]


def _kind(port: str) -> Kind:
    if port in ("wi-fi", "wlan", "airport"):
        return "wifi"
    # In this order: a `Thunderbolt Ethernet` is an adapter for Ethernet.
    if "ethernet" in port or " lan" in port:
        return "ethernet"
    return "thunderbolt" if "thunderbolt" in port else "unknown"


def _ask(*command: str) -> str:
    """What a tool of the system says; nothing where it fails, as nobody depends on it."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False).stdout
    return ""


def _load() -> tuple[CDLL, CDLL, c_void_p]:
    """IOKit and Core Foundation, with the types of what is called, and the mode of a run loop."""
    kit, foundation = (CDLL(FRAMEWORKS.format(name)) for name in ("IOKit", "CoreFoundation"))
    types: dict[Any, tuple[Any, list[Any]]] = {
        kit.IORegisterForSystemPower: (c_uint32, [c_void_p, c_void_p, _Callback, c_void_p]),
        kit.IOAllowPowerChange: (c_int32, [c_uint32, c_ssize_t]),
        kit.IONotificationPortGetRunLoopSource: (c_void_p, [c_void_p]),
        kit.IODeregisterForSystemPower: (c_int32, [c_void_p]),
        kit.IOServiceClose: (c_int32, [c_uint32]),
        kit.IONotificationPortDestroy: (None, [c_void_p]),
        foundation.CFRunLoopGetCurrent: (c_void_p, []),
        foundation.CFRunLoopAddSource: (None, [c_void_p, c_void_p, c_void_p]),
        foundation.CFRunLoopRunInMode: (c_int32, [c_void_p, c_double, c_ubyte]),
        foundation.CFRunLoopStop: (None, [c_void_p]),
    }
    for function, (result, arguments) in types.items():
        function.restype, function.argtypes = result, arguments
    return kit, foundation, c_void_p.in_dll(foundation, "kCFRunLoopDefaultMode")
