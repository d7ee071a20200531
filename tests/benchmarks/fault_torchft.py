"""torchft under the same faults: a lighthouse, and replicas that are processes of `torchft_rank.py`."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from fault_cluster import Cluster, Program, Side

RANK = Path(__file__).with_name("torchft_rank.py")
LIGHTHOUSE = ("--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000")
"""As in its README."""


class Iteration(NamedTuple):
    """Of one replica."""

    at_s: float
    step: int
    committed: bool
    num_replicas: int


class Torchft(Cluster):
    """Replicas and their lighthouse, or ranks of plain DDP.

    Args:
        folder, num_steps: as of `Cluster`.
        python: of the environment that torchft is installed in.
        num_parameters: of the model.
        num_plain: ranks of plain DDP; 0 for torchft.
    """

    def __init__(self, folder: Path, num_steps: int, python: Path, num_parameters: int, num_plain: int) -> None:
        super().__init__(folder, num_steps)
        self._python, self._num_parameters, self._num_plain = python, num_parameters, num_plain
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = f"127.0.0.1:{free.getsockname()[1]}"
        self._iterations: dict[Program, list[Iteration]] = {}
        self._num_bytes: dict[Path, int] = {}

    def coordinate(self) -> None:
        if not self._num_plain:
            lighthouse = self._python.with_name("torchft_lighthouse")
            self.coordinator = self.run([lighthouse, *LIGHTHOUSE, "--bind", self._address], {})
            host, port = self._address.split(":")
            while True:
                try:
                    socket.create_connection((host, int(port))).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)

    def look(self) -> None:
        news: list[Iteration] = []
        for number, program in enumerate(self._programs):
            log = self._log(number)
            seen = self._num_bytes.get(log, 0)
            if not log.exists() or log.stat().st_size == seen:
                continue
            with log.open("rb") as file:
                file.seek(seen)
                whole = file.read().rpartition(b"\n")
            self._num_bytes[log] = seen + len(whole[0]) + len(whole[1])
            for line in whole[0].decode().splitlines():
                if not line.startswith("digest"):
                    at_s, step, committed, num_replicas = line.split()
                    news.append(Iteration(float(at_s), int(step), committed == "1", int(num_replicas)))
                    self._iterations.setdefault(program, []).append(news[-1])
        for iteration in sorted(news):
            self.members.append((iteration.at_s, iteration.num_replicas))
            if iteration.committed and iteration.step > self.num_taken:
                self.commits.append((iteration.at_s, iteration.step))

    def rank(self, rank: int) -> Program:
        return self.workers[rank]

    def num_done(self, from_s: float) -> float:
        iterations = [each for of_one in self._iterations.values() for each in of_one]
        return sum(each.committed for each in iterations if each.at_s >= from_s) / NUM_REPLICAS

    def thrown_away(self) -> str:
        lost = {program: sum(not each.committed for each in of_one) for program, of_one in self._iterations.items()}
        return f"{sum(num for program, num in lost.items() if program not in self.disturbed)} iterations"

    def verdict(self) -> str:
        logs = [self._log(number) for number, program in enumerate(self._programs) if program in self.workers]
        digests = {log.read_text(encoding="utf-8").splitlines()[-1] for log in logs}
        return "equal on all" if len(digests) == 1 else f"{len(digests)} different results"

    def _command(self, number: int, seconds: float) -> tuple[Sequence[str | Path], dict[str, str]]:
        options = {
            "rank": number - (not self._num_plain),
            "log": self._log(number),
            "seconds": seconds,
            "num-steps": self.num_steps,
            "parameters": self._num_parameters,
        }
        if self._num_plain:
            options |= {"plain": self._num_plain, "store": self.folder / "store"}
        else:
            options["lighthouse"] = f"http://{self._address}"
        return [self._python, RANK, *(str(word) for pair in options.items() for word in (f"--{pair[0]}", pair[1]))], {}

    def _log(self, number: int) -> Path:
        return self.folder / f"log-{number}.txt"


NUM_REPLICAS = 3
"""That do what counts as a step."""


class TorchftSide(Side):
    """Another environment.

    Args:
        folder: for all runs.
        python: of the environment.
        size: of the model, as in `common.MODELS`.
    """

    num_units, takes_over, plain_is_one = 3, False, False

    def __init__(self, folder: Path, python: Path, size: str) -> None:
        self._folder, self._python = folder, python
        self._num_parameters = int(float(size.removesuffix("M")) * 1e6)
        self._numbers = count()

    @property
    def versions(self) -> str:
        """Of what is measured."""
        packages = ("torchft-nightly", "torch")
        code = f"from importlib.metadata import version; print(*map(version, {packages}))"
        found = subprocess.check_output([self._python, "-c", code], text=True).split()
        return ", ".join(" ".join(pair) for pair in zip(packages, found, strict=True))

    @contextmanager
    def cluster(self, num_steps: int, num_workers: int, share: str = "even", plain: bool = False) -> Iterator[Cluster]:
        folder = self._folder / f"torchft-{next(self._numbers)}"
        folder.mkdir()
        cluster = Torchft(folder, num_steps, self._python, self._num_parameters, num_workers if plain else 0)
        try:
            cluster.coordinate()
            yield cluster
        finally:
            cluster.close()
