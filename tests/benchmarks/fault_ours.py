"""This program under faults: a coordinator and workers that join it, each a command of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paced
from common import build_model, fresh, mlx_train, write_config, write_rows
from fault_cluster import Cluster, Program, RunOverError, Side

from mlx_distributed.cli.output_dir import JOURNAL
from mlx_distributed.elastic.journal import parse
from mlx_distributed.elastic.protocol import CommitRecord, Epoch, EpochRecord

NUM_ROWS, NUM_TOKENS = 1, 64
"""Of a micro-batch: little to compute, as most of its time is slept through."""
PACED = (sys.executable, paced.__file__)
LAST_S = 10.0
"""So long the coordinator may take to end after the workers."""


class Elastic(Cluster):
    """An elastic run.

    Args:
        folder, num_steps: as of `Cluster`.
        side: of it.
        file: the configuration, in `folder`.
    """

    def __init__(self, folder: Path, num_steps: int, side: Ours, file: Path) -> None:
        super().__init__(folder, num_steps)
        self._side, self._file = side, file
        self._journal, self._num_bytes = folder / "run" / JOURNAL, 0
        self._epoch: Epoch | None = None
        self._join_string = ""

    def coordinate(self) -> None:
        self.coordinator = self.run([self._side.script("mlx-distributed"), "coordinator", "--config", self._file], {})
        self._join_string = self.coordinator.said("mlx-train --join ")

    def look(self) -> None:
        if not self._journal.exists() or self._journal.stat().st_size == self._num_bytes:
            return
        with self._journal.open("rb") as file:
            file.seek(self._num_bytes)
            records, num_bytes = parse(file.read(), str(self._journal))
        now_s, self._num_bytes = time.monotonic(), self._num_bytes + num_bytes
        for record in records:
            if isinstance(record, EpochRecord):
                self._epoch = record.epoch
                self.members.append((now_s, len(record.epoch.seats)))
            elif isinstance(record, CommitRecord):
                self.commits.append((now_s, record.outcome.step))

    def rank(self, rank: int) -> Program:
        assert self._epoch is not None
        name = self._epoch.seats[rank].worker.name
        return next(worker for worker in self.workers if f"-{worker.process.pid}-" in name)

    def num_done(self, from_s: float) -> float:
        return sum(at_s >= from_s for at_s, _ in self.commits)

    def thrown_away(self) -> str:
        times: Counter[str] = Counter()
        for number, program in enumerate(self._programs):
            log, disturbed = self.folder / f"computed-{number}.txt", self.disturbed.get(program)
            for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
                # What a worker was computing when it was killed or stopped, others had to compute once more.
                if disturbed is None or abs(int(line.split()[0]) - disturbed) > 1:
                    times[line] += 1
        return f"{sum(times.values()) - len(times)} micro-batches"

    def verdict(self) -> str:
        if self.coordinator.process.wait(LAST_S):
            raise RunOverError(f"the coordinator has failed: {self.coordinator.text[-2000:]}")
        taken = [step for _, step in self.commits]
        if taken != list(range(1, self.num_steps + 1)):
            raise SystemExit(f"steps were not taken once each: {taken}")
        folders = sorted(self.folder.glob("joined-*"))
        fresh(check_ledger, self.folder / "run", [folder for folder in folders if (folder / "metrics.jsonl").exists()])
        (ended,) = [folder for folder in folders if (folder / "final").exists()]
        self._side.check(ended, self.num_steps)
        return "each sample once; equal bits"

    def _command(self, number: int, seconds: float) -> tuple[Sequence[str | Path], dict[str, str]]:
        command: list[str | Path] = [
            sys.executable,
            paced.__file__,
            "join",
            self._join_string,
            self.folder / f"joined-{number}",
        ]
        return command, self._side.pace(seconds, self.folder / f"computed-{number}.txt")


class Plain(Elastic):
    """A run without a coordinator, for the time of its steps."""

    def coordinate(self) -> None:
        pass

    def look(self) -> None:
        metrics, now_s = self.folder / "run/metrics.jsonl", time.monotonic()
        num_lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self.commits += [(now_s, step) for step in range(self.num_taken + 1, num_lines + 1)]

    def verdict(self) -> str:
        return ""

    def _command(self, number: int, seconds: float) -> tuple[Sequence[str | Path], dict[str, str]]:
        return [*PACED, "train", self._file], self._side.pace(seconds, self.folder / "computed.txt")


class Ours(Side):
    """A model, data, and runs of them.

    Args:
        folder: for all of them.
        size: of the model, as in `common.MODELS`.
    """

    num_units, takes_over, plain_is_one = 12, True, True

    def __init__(self, folder: Path, size: str) -> None:
        self._folder = folder
        data = write_rows(folder / "rows.json", num_rows=500, num_words=(8, 8))
        self._config: dict[str, Any] = {
            "model": {"path": str(fresh(build_model, folder / "model", data, size))},
            "method": "full",
            "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
            "train": {"micro_batch_size": NUM_ROWS, "device": "cpu"},
            "checkpoint": {"steps": None},
        }
        self._digests: dict[int, str] = {}
        self._num_runs = 0

    @contextmanager
    def cluster(self, num_steps: int, num_workers: int, share: str = "even", plain: bool = False) -> Iterator[Cluster]:
        elastic = {} if plain else {"enabled": True, "listen": "127.0.0.1:0"}
        file = self._write(num_steps, elastic=elastic, parallel={"nproc": num_workers, "share": share})
        cluster = (Plain if plain else Elastic)(file.parent, num_steps, self, file)
        try:
            cluster.coordinate()
            yield cluster
        finally:
            cluster.close()

    @staticmethod
    def script(name: str) -> Path:
        """A command of the program."""
        return Path(sys.executable).with_name(name)

    @staticmethod
    def pace(seconds: float, log: Path) -> dict[str, str]:
        """The environment of workers."""
        paths = [str(Path(paced.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PACE_S": str(seconds), "PACE_LOG": str(log), "PYTHONPATH": os.pathsep.join(paths)}

    def check(self, trained: Path, num_steps: int) -> None:
        """What came of a run must have the bits of an undisturbed one, of one worker and without elastic training."""
        if num_steps not in self._digests:
            file = self._write(num_steps, parallel={"nproc": 1})
            mlx_train(file)
            self._digests[num_steps] = self._digest(file.parent / "run")
        if self._digest(trained) != self._digests[num_steps]:
            raise SystemExit(f"{trained}: not the bits of the undisturbed run")

    def _write(self, num_steps: int, **sections: Any) -> Path:
        """A configuration in a folder of its own."""
        self._num_runs += 1
        train = self._config["train"] | {"max_steps": num_steps, "global_batch_size": NUM_ROWS * self.num_units}
        return write_config(self._folder / f"run-{self._num_runs}", self._config | {"train": train, **sections})

    def _digest(self, folder: Path) -> str:
        """Of weights and moments."""
        return subprocess.check_output([self.script("mlx-distributed"), "digest", folder], text=True)


def check_ledger(coordinated: Path, trained: Sequence[Path]) -> None:
    """See `support.assert_exactly_once`. To be called through `fresh`."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support import assert_exactly_once

    assert_exactly_once(coordinated, trained)
