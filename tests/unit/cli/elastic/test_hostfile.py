from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.cli.elastic.hostfile import Host, parse_hosts, read_hostfile
from mlx_distributed.errors import ConfigError


def write(folder: Path, plain: Any) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps(plain))
    return path


def test_hosts_are_named_as_for_ssh() -> None:
    names = ["b", "ada@studio.local", "192.168.1.7", "fe80::1%en0", "Mac-2", "ada.l_2@b"]
    assert [host.name for host in parse_hosts(", ".join(names))] == names


@given(st.text(max_size=8).filter(lambda text: "," not in text))
def test_no_name_is_taken_for_an_option_or_more_than_a_name(text: str) -> None:
    try:
        ((name, _),) = parse_hosts(text)
    except ConfigError:
        return
    assert name == text.strip()
    assert name.isascii()
    assert not name.startswith("-")
    assert not name.partition("@")[2].startswith("-")
    assert not set(name) & set(" \t\n'\"\\$`;&|<>()/*?!#")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-oProxyCommand=x", "'-oProxyCommand=x' is not the name of a host"),
        ("ada@-x", "is not the name of a host"),
        ("b,,c", "'' is not the name of a host"),
        ("b c", "is not the name of a host"),
        ("b:2222", "b:2222 has a port, which ssh takes from its configuration"),
        ("b,c,b", "b is named twice"),
    ],
)
def test_what_cannot_be_a_host_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_hosts(text)


@pytest.mark.parametrize("wrap", [lambda hosts: hosts, lambda hosts: {"backend": "ring", "envs": [], "hosts": hosts}])
def test_both_forms_of_a_hostfile(tmp_path: Path, wrap: Any) -> None:
    plain = wrap([{"ssh": "b", "ips": ["10.0.0.2", "10.0.1.2"], "rdma": [None]}, {"ssh": "c"}])
    assert read_hostfile(write(tmp_path, plain)) == [Host("b", ("10.0.0.2", "10.0.1.2")), Host("c")]


@pytest.mark.parametrize("plain", [3, "b", ["b"], [{"ips": []}], {"b": 1}, [{"ssh": "b", "ips": 7}], None])
def test_what_is_no_hostfile_is_refused(tmp_path: Path, plain: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a hostfile: it must be JSON"):
        read_hostfile(write(tmp_path, plain))


def test_a_hostfile_with_nobody_or_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no machine"):
        read_hostfile(write(tmp_path, []))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match="'-x' is not the name of a host"):
        read_hostfile(write(tmp_path, [{"ssh": "-x"}]))


def test_this_machine_is_known_by_its_names() -> None:
    for name in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().upper()):
        assert Host(name).is_here
    assert not Host("studio.invalid").is_here
