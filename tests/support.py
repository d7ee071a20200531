"""Real runs of the command line: configured, started, watched, ended and compared."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_distributed.cli import distributed
from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.local import OPENBLAS_HINT
from mlx_distributed.cli.output_dir import JOURNAL
from mlx_distributed.comm.base import LocalComm
from mlx_distributed.config import load_config
from mlx_distributed.elastic.journal import parse
from mlx_distributed.elastic.protocol import CommitRecord, EpochRecord, Record
from mlx_distributed.testing import tiny_model

MLX_TRAIN = Path(sys.executable).with_name("mlx-train")

NUM_STEPS = 20
CONFIG: dict[str, Any] = {
    "model": {"path": "tied"},
    "method": "full",
    "data": {"train": "rows.jsonl", "val_fraction": 0.1},
    # Six micro-batches a step; the last step of an epoch has fewer, and one of them is short.
    "train": {"global_batch_size": 12, "micro_batch_size": 2, "max_steps": NUM_STEPS, "device": "cpu"},
    "optimizer": {"learning_rate": 5e-3},
    "checkpoint": {"steps": 5},
    "output_dir": "out",
}


def write_rows(path: Path, num_rows: int = 50) -> Path:
    """Conversations of one and two turns, all of another length."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            turns = [("user", f"Say {i} twice{', please' * (i % 5)}."), ("assistant", f"{i} {i}" + "!" * (i % 7))]
            if i % 3 == 0:
                turns += [("user", "And the one after it?"), ("assistant", str(i + 1))]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_workspace(folder: Path) -> Path:
    """A folder with data, a model with tied embeddings, one without, and `CONFIG`, whose path is returned."""
    write_rows(folder / "rows.jsonl")
    tiny_model(folder / "tied")
    tiny_model(folder / "untied", tied=False)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return config


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str
    """But for a hint about the machine."""

    @property
    def error(self) -> str:
        """What stderr says after "error: ", which stands there once and alone."""
        assert self.stderr.startswith("error: "), self
        assert "\nerror: " not in self.stderr, self
        assert "Traceback" not in self.stdout + self.stderr, self
        return self.stderr.removeprefix("error: ")


class Run:
    """An `mlx-train` that is under way; killed at the end of a `with` if it still is.

    Args:
        config: file of the run.
        arguments: further ones of the command line.
    """

    def __init__(self, config: Path, *arguments: str | Path) -> None:
        command = [MLX_TRAIN, "--config", config, *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._stdout = ""

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes the pipes and waits
            if self._process.poll() is None:
                self.kill()

    def read_until(self, text: str) -> None:
        """Read the output up to a line that has this text."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._stdout += line
            if text in line:
                return
        raise AssertionError(f"{text!r} never came: {self.wait()}")

    def spin_until(self, condition: Callable[[], object]) -> None:
        """Wait for something that may last less than a millisecond."""
        while not condition():
            assert self._process.poll() is None, self.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """Process ids of those that run, in rank order."""
        return children(self._process.pid)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def kill_parent(self) -> None:
        """`kill -9` of `mlx-train` alone."""
        self._process.kill()

    def kill(self) -> None:
        """`kill -9` of `mlx-train` and all its workers."""
        workers = self.workers
        self._process.kill()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> Done:
        """Wait for the end, which comes when no process of the run is left that could write to its output."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdout += self._process.stdout.read()
        stderr = self._process.stderr.read().removeprefix(f"{OPENBLAS_HINT}\n")
        return Done(self._process.wait(), self._stdout, stderr)


def train(config: Path, *arguments: str | Path) -> Done:
    """`mlx-train`, from the beginning to the end."""
    with Run(config, *arguments) as run:
        return run.wait()


def train_all(config: Path, runs: Mapping[Path, Sequence[str]]) -> None:
    """Several runs at once, since most of a short one is its start: output_dir -> arguments. All must succeed."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(Run(config, *arguments, "--output-dir", folder)) for folder, arguments in runs.items()
        ]
        for run in started:
            done = run.wait()
            assert (done.status, done.stderr) == (0, ""), done


def children(pid: int) -> list[int]:
    """Process ids of the direct children, in the order in which they were started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    if listed.exists():
        return [int(child) for child in listed.read_text().split()]
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (map(int, line.split()) for line in table.splitlines())
    return sorted(child for child, parent in pairs if parent == pid)


def ends_within(pid: int, limit_s: float) -> bool:
    """Wait for the end of any process, not only of a child; whether it came in time."""
    try:
        if not hasattr(os, "pidfd_open"):  # macOS
            watch = select.kevent(pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD, select.KQ_NOTE_EXIT)
            with contextlib.closing(select.kqueue()) as queue:
                return bool(queue.control([watch], 1, limit_s))
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], limit_s)[0])
    finally:
        os.close(descriptor)


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports of the loopback interface that nobody uses.

    They are below those that systems give to outgoing connections (from 32768 on Linux, from 49152 on macOS).
    """
    while True:
        first = random.randint(20000, 30000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


def digest(path: Path) -> str:
    """What `mlx-distributed digest` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert distributed.main(["digest", str(path)]) == 0
    return stdout.getvalue()


def metrics(output_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what differs from machine to machine."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.startswith("perf/")} for line in lines]


def steps(output_dir: Path) -> list[int]:
    """Steps in metrics.jsonl that were trained."""
    return [int(line["step"]) for line in metrics(output_dir) if "train/loss" in line]


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first."""
    return sorted((output_dir / "checkpoints").glob("step-*"))


class Command(Run):
    """Any command of the program, watched in the same way.

    Args:
        program: a console script.
        arguments: of the command line.
        namespace: of the network that it runs in; None means that of the tests.
    """

    def __init__(self, program: str, *arguments: str | Path, namespace: str | None = None) -> None:
        inside = [] if namespace is None else ["ip", "netns", "exec", namespace]
        command = [*inside, MLX_TRAIN.with_name(program), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._stdout = ""

    def join_string(self) -> str:
        """Read the output up to the join string of a coordinator, and return it."""
        self.read_until("on another machine: mlx-train --join ")
        return self._stdout.split()[-1]

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for something, and leave the processor to those that are to do it."""
        while not condition():
            assert self._process.poll() is None, self.wait()
            time.sleep(0.01)


def journal(output_dir: Path) -> list[Record]:
    """What the coordinator of a run has written down so far."""
    path = output_dir / JOURNAL
    return parse(path.read_bytes(), str(path))[0] if path.exists() else []


def epochs(output_dir: Path) -> list[list[str]]:
    """Names of the members of every epoch of an elastic run so far, in rank order."""
    formed = [record.epoch for record in journal(output_dir) if isinstance(record, EpochRecord)]
    return [[seat.worker.name for seat in epoch.seats] for epoch in formed]


def commits(output_dir: Path) -> list[int]:
    """Steps of an elastic run that are taken, in the order in which they were."""
    return [record.outcome.step for record in journal(output_dir) if isinstance(record, CommitRecord)]


def assert_exactly_once(coordinated: Path, trained: Sequence[Path]) -> None:
    """Of an elastic run that sums in every step, from its logs alone: in each pass over the data every row was trained
    once, in the last pass at most once.

    The journal has the steps that were taken, and the plan, a pure function of the data and the configuration, their
    rows. That the sum of a step was over these rows says the number of label tokens in it, in metrics.jsonl.

    Args:
        coordinated: output of the coordinator; all sources of the data have weight 1.
        trained: of those that were rank 0 one after the other.
    """
    loaded = load_all(load_config(coordinated / "config.yaml"), LocalComm())
    plan, rows = loaded.plan, loaded.rows.train
    of_step = {
        step: [row for microbatch in plan.microbatches(step - 1) for row in microbatch] for step in commits(coordinated)
    }
    passes = [Counter[int]() for _ in range(0, plan.num_steps, plan.steps_per_epoch)]
    for step in commits(coordinated):
        passes[(step - 1) // plan.steps_per_epoch].update(of_step[step])
    if plan.num_steps % plan.steps_per_epoch:
        assert set(passes.pop().values()) == {1}
    for times in passes:
        assert times == Counter(range(len(rows)))
    told = [line for folder in trained for line in metrics(folder) if "train/loss" in line]
    assert {int(line["step"]) for line in told} == of_step.keys()
    for line in told:
        num_tokens = sum(int(rows[row].loss_mask[1:].sum()) for row in of_step[int(line["step"])])
        assert line["train/num_tokens"] == num_tokens, line
