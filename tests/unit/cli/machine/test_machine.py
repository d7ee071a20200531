"""What is asked of the machine: its interfaces by name, and what people are warned of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlx_distributed.cli.machine import machine
from mlx_distributed.cli.machine.interfaces import Interface, address_of, advice, resolve
from mlx_distributed.cli.machine.machine import Plain, this_machine
from mlx_distributed.errors import ConfigError

WIFI = Interface("en0", "192.168.1.7", "wifi")
ETHERNET = Interface("en5", "192.168.1.8", "ethernet")
BRIDGE = Interface("bridge0", "169.254.12.7", "thunderbolt")
LOOPBACK = Interface("lo0", "127.0.0.1", "loopback")


def test_this_machine_has_a_loopback_interface() -> None:
    (loopback,) = [each for each in this_machine().interfaces() if each.address == "127.0.0.1"]
    assert loopback.kind == "loopback"
    assert resolve(f"{loopback.name}:4000", this_machine().interfaces()) == "127.0.0.1:4000"


def test_the_name_of_an_interface_stands_for_its_address() -> None:
    assert resolve("bridge0:0", [WIFI, BRIDGE]) == "169.254.12.7:0"
    for listen in ("192.168.1.7:4000", "[::1]:0", "localhost:4000"):
        assert resolve(listen, [WIFI, BRIDGE]) == listen


@pytest.mark.parametrize("host", ["en7", "no-such-host.invalid", "a" * 70])
def test_what_is_neither_host_nor_interface_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"{host} is neither .* those are en0 \(192.168.1.7\), lo0 \(127.0.0.1\)$"):
        resolve(f"{host}:0", [WIFI, LOOPBACK])


def test_wifi_is_warned_of_where_there_is_a_cable() -> None:
    (line,) = advice(WIFI.address, [LOOPBACK, WIFI, ETHERNET, BRIDGE], on_battery=False)
    assert "over Wi-Fi (en0), though it has thunderbolt" in line
    assert "set elastic.listen=bridge0:0" in line
    assert "elastic.listen=en5:0" in advice(WIFI.address, [WIFI, ETHERNET], on_battery=False)[0]


@pytest.mark.parametrize(
    ("address", "interfaces"),
    [
        (WIFI.address, [LOOPBACK, WIFI]),
        (ETHERNET.address, [WIFI, ETHERNET]),
        ("127.0.0.1", [LOOPBACK, WIFI, ETHERNET]),
        ("10.0.0.1", [WIFI, ETHERNET]),
    ],
    ids=["no cable", "by cable", "alone", "of nobody"],
)
def test_there_is_nothing_to_warn_of(address: str, interfaces: list[Interface]) -> None:
    assert advice(address, interfaces, on_battery=False) == []


def test_a_battery_is_warned_of() -> None:
    assert advice("127.0.0.1", [LOOPBACK], on_battery=True) == [
        "this machine runs on battery, and may sleep while it trains; connect it to power"
    ]


def test_a_host_has_an_address() -> None:
    assert address_of("localhost") == "127.0.0.1"
    assert address_of("[::1]") == "[::1]"


def test_what_linux_says_of_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("wlp2s0/wireless", "wlp2s0/device", "enp3s0/device", "thunderbolt0/device", "docker0/bridge"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(machine, "NETWORK", tmp_path)
    monkeypatch.setattr(
        machine, "with_addresses", lambda kinds: [Interface(name, "", kind) for name, kind in sorted(kinds.items())]
    )
    kinds = {interface.name: interface.kind for interface in Plain().interfaces()}
    assert kinds == {"docker0": "unknown", "enp3s0": "ethernet", "thunderbolt0": "thunderbolt", "wlp2s0": "wifi"}


def test_nothing_is_done_about_sleep_on_linux() -> None:
    with Plain().awake(), Plain().on_sleep(pytest.fail, pytest.fail):
        assert not Plain().on_battery()


def test_a_mac_is_told_from_linux() -> None:
    assert type(this_machine()).__name__ == ("Mac" if sys.platform == "darwin" else "Plain")
