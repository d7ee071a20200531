from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.cli.elastic.hostfile import Host
from mlx_distributed.cli.elastic.ssh import Remotes, address_towards, ending, folder_for, remote_command

SAY = f"{sys.executable} -Ssc 'import os, sys; print(ascii([os.getcwd(), *sys.argv[1:]]))'"


def said(command: str, home: Path) -> str:
    """What a shell like that of sshd makes of a command."""
    env = {**os.environ, "SHELL": "/bin/sh", "HOME": str(home)}
    return subprocess.run(["/bin/sh", "-c", command], cwd=home, env=env, capture_output=True, text=True).stdout


@settings(max_examples=20, deadline=None)
@given(arguments=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), max_size=3))
def test_arguments_come_through_two_shells_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str]
) -> None:
    home = tmp_path_factory.getbasetemp()
    assert said(remote_command(SAY, arguments, None), home) == f"{[str(home), *arguments]!a}\n"


@pytest.mark.parametrize("cwd", ["a b", "~/a b", "./a b", "-x", "$HOME", "'"])
def test_the_folder_is_one_in_the_home_folder(tmp_path: Path, cwd: str) -> None:
    folder = tmp_path / cwd.removeprefix("~/")
    folder.mkdir(parents=True)
    assert said(remote_command(SAY, [], cwd), tmp_path) == f"{[str(folder)]!a}\n"
    assert said(remote_command(SAY, [], str(folder)), Path.cwd()) == f"{[str(folder)]!a}\n"
    assert said(remote_command(SAY, [], "gone"), tmp_path) == ""


def test_every_host_has_a_folder_of_its_own() -> None:
    assert folder_for("0123456789abcdef", "ada@fe80::1%en0") == "runs/joined-01234567-ada-fe80--1-en0"
    assert ".." not in folder_for("0123456789abcdef", "../b").split("/")


def test_the_address_by_which_hosts_reach_this_machine(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host here\n  HostName 127.0.0.1\nHost gone\n  HostName no-such-host.invalid\n")
    ssh = ["ssh", "-F", str(config)]
    assert address_towards(ssh, [Host("gone"), Host("here")]) == "127.0.0.1"
    assert address_towards(ssh, [Host("gone", ("127.0.0.1",))]) == "127.0.0.1"
    assert address_towards(ssh, [Host("gone"), Host("a..b")]) is None


@pytest.mark.parametrize(
    ("status", "started", "told", "words"),
    [
        (0, True, False, None),
        (130, True, False, None),
        (2, True, True, None),
        (1, True, False, r"^b: 'mlx-train' ended with status 1 \(one; two\); the others go on without it\."),
        (2, False, False, r"^b: 'mlx-train' ended with status 2 \(one; two\)"),
        (255, False, False, r"^b: ssh cannot connect \(one; two\); .* `ssh b` works; the others go on"),
        (255, True, False, r"^b: the connection was lost \(one; two\); its worker goes on"),
        (127, False, False, r"^b: the login shell there does not find 'mlx-train' \(one; two\); .* --remote-command"),
        (126, False, False, r"^b: the login shell there does not find"),
    ],
)
def test_what_is_said_of_an_end(status: int, started: bool, told: bool, words: str | None) -> None:
    text = ending("b", "mlx-train", status, started, ["zero", "one", "", "two "], told)
    if words is None:
        assert text is None
    else:
        assert text is not None
        assert re.search(words, text), text


def test_who_does_not_listen_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever this is, it answers each Ctrl-C that it is told of with one more."""
    remotes = Remotes({"b": ["sh", "-c", "while read line; do kill -INT $PPID; done"]}, "sh")
    assert not remotes.may_train
    remotes.start("STRING")
    assert remotes.may_train
    remotes.close(over=False)
    assert not remotes.may_train
    assert capsys.readouterr().err.startswith("error: b: 'sh' ended with status -9 (no reason was given)")
