"""Workers in network namespaces, whose links are cut and made slow: the model has the bits of an undisturbed run.

Needs Linux and root. The namespaces are joined by a bridge in one more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import Command, commits, digest, epochs, train_all

NUM_STEPS = 120
LENGTH = [f"train.max_steps={NUM_STEPS}", "checkpoint.steps=null"]
MBIT = 20
"""Of every link at first: a step takes about a tenth of a second, so that there is time for something to happen."""


def ip(command: str) -> None:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be made: ip {command}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Network:
    """Hosts 0, 1 and 2, with the addresses 10.0.0.1 and so on."""

    switch: str
    hosts: Sequence[str]

    def slow_down(self, mbit: float) -> None:
        """What every link gives, either way."""
        for number, host in enumerate(self.hosts):
            for namespace, device in ((host, "eth0"), (self.switch, f"port{number}")):
                shape = f"tbf rate {int(mbit * 1000)}kbit burst 64kb limit 256kb"
                tc = ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape.split()]
                subprocess.run(tc, check=True)

    def cut(self, *numbers: int) -> None:
        """Take hosts off the network."""
        for number in numbers:
            ip(f"-n {self.switch} link set port{number} down")

    def mend(self, *numbers: int) -> None:
        for number in numbers:
            ip(f"-n {self.switch} link set port{number} up")

    def cut_between(self, one: int, other: int) -> None:
        """What two hosts send each other goes to nobody."""
        for source, target in ((one, other), (other, one)):
            address = f"10.0.0.{target + 1} lladdr 02:00:00:00:00:99"
            ip(f"-n {self.hosts[source]} neigh replace {address} nud permanent dev eth0")


@pytest.fixture
def network() -> Iterator[Network]:
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need Linux, root and iproute2")
    switch, *hosts = [f"mlx-distributed-{os.getpid()}-{end}" for end in ("switch", 0, 1, 2)]
    with contextlib.ExitStack() as stack:
        for name in (switch, *hosts):
            ip(f"netns add {name}")
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        ip(f"-n {switch} link add bridge type bridge")
        ip(f"-n {switch} link set bridge up")
        for number, host in enumerate(hosts):
            ip(f"-n {host} link add eth0 type veth peer name port{number} netns {switch}")
            ip(f"-n {switch} link set port{number} master bridge up")
            ip(f"-n {host} addr add 10.0.0.{number + 1}/24 dev eth0")
            ip(f"-n {host} link set lo up")
            ip(f"-n {host} link set eth0 up")
        network = Network(switch, hosts)
        network.slow_down(MBIT)
        yield network


@dataclass(frozen=True)
class Trio:
    """A run of three workers; the coordinator is on the host of the first."""

    out: Path
    commands: Sequence[Command]
    names: Sequence[str]
    num_epochs: int
    """Until all three were there."""

    def wait_for(self, *numbers: int) -> None:
        """Until these, and no others, take steps together."""
        names = {self.names[number] for number in numbers}
        self.commands[0].wait_until(lambda: names == set(epochs(self.out)[-1]))

    def wait_for_steps(self, count: int) -> None:
        num_taken = len(commits(self.out))
        self.commands[0].wait_until(lambda: len(commits(self.out)) >= num_taken + count)
        assert len(commits(self.out)) < NUM_STEPS


@contextlib.contextmanager
def trio(config: Path, folder: Path, network: Network, min_workers: int) -> Iterator[Trio]:
    out = folder / "out"
    with contextlib.ExitStack() as stack:
        elastic = ["elastic.enabled=true", "elastic.listen=10.0.0.1:0", f"elastic.min_workers={min_workers}"]
        arguments = ["--config", config, "--output-dir", out, "--nproc", "1", *elastic, *LENGTH]
        first = stack.enter_context(Command("mlx-train", *arguments, namespace=network.hosts[0]))
        text = first.join_string()
        others = [
            stack.enter_context(
                Command("mlx-train", "--join", text, "--output-dir", folder / f"joined-{number}", namespace=host)
            )
            for number, host in enumerate(network.hosts[1:])
        ]
        first.wait_until(lambda: epochs(out) and len(epochs(out)[-1]) == 3)
        first.read_until("training goes on")
        own = min(epochs(out)[-1], key=len)
        names = [own, *(f"{own.removesuffix('-0')}-{other.pid}-0" for other in others)]
        yield Trio(out, [first, *others], names, len(epochs(out)))


@pytest.mark.timeout(300)
def test_links_are_cut_and_become_slow(config: Path, network: Network, tmp_path: Path) -> None:
    """One run, to which one thing happens after the other: most of a short one is its start."""
    with trio(config, tmp_path, network, min_workers=2) as run:
        run.wait_for_steps(1)
        network.slow_down(MBIT / 10)
        run.wait_for_steps(2)
        assert len(epochs(run.out)) == run.num_epochs, "nobody is given up for a slow link"

        # A minority is cut off, and comes back.
        network.cut(1)
        run.wait_for(0, 2)
        run.wait_for_steps(1)
        network.mend(1)
        run.wait_for(0, 1, 2)
        network.slow_down(MBIT)
        run.wait_for_steps(1)

        # A majority is cut off from the coordinator.
        network.cut(1, 2)
        run.commands[0].read_until("1 of at least 2 workers are ready to train")
        num_taken, num_epochs = len(commits(run.out)), len(epochs(run.out))
        network.mend(1, 2)
        run.commands[0].wait_until(lambda: len(epochs(run.out)) > num_epochs)
        assert len(commits(run.out)) == num_taken, "nobody goes on alone, on either side"
        run.wait_for(0, 1, 2)
        run.wait_for_steps(1)

        # Two that reach the coordinator do not reach each other any more: one of them has to go.
        network.cut_between(1, 2)
        run.commands[0].wait_until(lambda: len(epochs(run.out)[-1]) == 2)
        others = [name in epochs(run.out)[-1] for name in run.names]
        assert others in ([True, True, False], [True, False, True])
        for command, to_the_end in zip(run.commands, others, strict=True):
            done = command.wait()
            over = not to_the_end and "error: this run is over: all steps are taken" in done.stderr
            assert over or (done.status, done.stderr) == (0, ""), done
    assert commits(run.out) == list(range(1, NUM_STEPS + 1))
    train_all(config, {tmp_path / "undisturbed": LENGTH})
    assert digest(run.out) == digest(tmp_path / "undisturbed")
