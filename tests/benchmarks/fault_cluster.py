"""Workers under faults, whoever makes them: programs that are started, killed and stopped, and their steps."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

POLL_S = 0.002
PATIENCE_S = 150.0
"""A cluster that takes no step for so long is given up."""

OTHERS_S = 5.0
"""So long after the first worker that has ended others are counted too."""


class RunOverError(Exception):
    """A program that nothing was done to has ended, or nothing happens any more."""


class Program:
    """A command in a session of its own, with what it prints in a file."""

    def __init__(self, output: Path, command: Sequence[str | Path], **environment: str) -> None:
        self.output = output
        with output.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [*map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def signal(self, number: signal.Signals) -> None:
        """To it and its children."""
        pid = self.process.pid
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
            for process in (*map(int, children), pid):
                os.kill(process, number)

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def said(self, words: str) -> str:
        """Wait for words; what follows them."""
        limit_s = time.monotonic() + PATIENCE_S
        while words not in self.text:
            if self.process.poll() is not None or time.monotonic() > limit_s:
                raise RunOverError(f"{words!r} never came: {self.text[-2000:]}")
            time.sleep(POLL_S)
        return self.text.partition(words)[2].split()[0]


class Cluster(ABC):
    """Workers and what coordinates them.

    Args:
        folder: where everything is written; exists.
        num_steps: after which the workers end.
    """

    coordinator: Program

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder, self.num_steps = folder, num_steps
        self.commits: list[tuple[float, int]] = []
        """When, on the monotonic clock, and which step, from 1."""
        self.members: list[tuple[float, int]] = []
        """When the number of those that take steps together was found to be what."""
        self.workers: list[Program] = []
        """That nobody has killed."""
        self.disturbed: dict[Program, int] = {}
        """After how many steps a worker was killed or stopped."""
        self._programs: list[Program] = []

    @abstractmethod
    def coordinate(self) -> None:
        """Start the coordinator, or start it again."""

    @abstractmethod
    def look(self) -> None:
        """Take in what is new."""

    @abstractmethod
    def rank(self, rank: int) -> Program:
        """Who has a rank now."""

    @abstractmethod
    def num_done(self, from_s: float) -> float:
        """Whole steps' worth of samples trained since then."""

    @abstractmethod
    def thrown_away(self) -> str:
        """What workers that nobody disturbed have finished in vain."""

    @abstractmethod
    def verdict(self) -> str:
        """What there is to say of the result, when all have ended. Raises SystemExit where it must not be so."""

    @abstractmethod
    def _command(self, number: int, seconds: float) -> tuple[Sequence[str | Path], dict[str, str]]:
        """To start a worker, and its environment."""

    def add(self, seconds: float) -> Program:
        """One more worker.

        Args:
            seconds: that it is to take for a unit of work: a micro-batch, or of others an iteration.
        """
        command, environment = self._command(len(self._programs), seconds)
        self.workers.append(self.run(command, environment))
        return self.workers[-1]

    def run(self, command: Sequence[str | Path], environment: dict[str, str]) -> Program:
        """Start a program that is to end with this cluster."""
        program = Program(self.folder / f"output-{len(self._programs)}.txt", command, **environment)
        self._programs.append(program)
        return program

    def kill(self, worker: Program) -> None:
        """`kill -9`."""
        self.disturbed[worker] = len(self.commits)
        self.workers.remove(worker)
        worker.signal(signal.SIGKILL)

    @contextlib.contextmanager
    def stopped(self, worker: Program) -> Iterator[None]:
        """SIGSTOP for a while."""
        self.disturbed[worker] = len(self.commits)
        worker.signal(signal.SIGSTOP)
        yield
        worker.signal(signal.SIGCONT)

    def pause(self) -> None:
        """Watch for a moment."""
        time.sleep(POLL_S)
        self.look()
        if self.commits and self.commits[-1][1] >= self.num_steps:
            return
        if ended := [program for program in self.workers if program.process.poll() is not None]:
            time.sleep(OTHERS_S)
            num_ended = sum(program.process.poll() is not None for program in self.workers)
            words = ended[0].text.strip()[-2000:]
            raise RunOverError(f"{num_ended} of {len(self.workers)} workers have ended, the first with: {words}")

    def until_step(self, step: int) -> None:
        """Watch until a step is taken."""
        limit_s = time.monotonic() + PATIENCE_S
        while not self.commits or self.commits[-1][1] < step:
            self.pause()
            if self.commits:
                limit_s = max(limit_s, self.commits[-1][0] + PATIENCE_S)
            if time.monotonic() > limit_s:
                raise RunOverError(f"step {step} was never taken")

    def more(self, num_steps: int) -> None:
        """Watch for so many steps, or to the end."""
        self.until_step(min(self.num_taken + num_steps, self.num_steps))

    def until_together(self, num: int) -> None:
        """Watch until so many take steps together."""
        limit_s = time.monotonic() + PATIENCE_S
        while not self.members or self.members[-1][1] != num:
            self.pause()
            if time.monotonic() > limit_s:
                raise RunOverError(f"{num} workers never came together")

    def rest(self, duration_s: float) -> None:
        """Watch for so long."""
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            self.pause()

    def end(self) -> None:
        """Wait for all that were not killed."""
        self.until_step(self.num_steps)
        for program in self.workers:
            if program.process.wait(PATIENCE_S):
                raise RunOverError(f"a worker has failed: {program.text.strip()[-2000:]}")

    def close(self) -> None:
        """Kill what is left."""
        for program in self._programs:
            if program.process.poll() is None:
                program.signal(signal.SIGKILL)
            program.process.wait()

    @property
    def num_taken(self) -> int:
        """Steps."""
        return self.commits[-1][1] if self.commits else 0

    def gap_s(self, from_s: float, to_s: float = float("inf")) -> float:
        """The longest time between two steps of which the second was in this time."""
        times = [at_s for at_s, _ in self.commits]
        return max(b - a for a, b in pairwise(times) if from_s <= b <= to_s)

    def step_s(self, from_s: float = 0.0, to_s: float = float("inf")) -> float:
        """The median step in this time."""
        times = [at_s for at_s, _ in self.commits if from_s <= at_s <= to_s]
        return statistics.median(b - a for a, b in pairwise(times))

    def fewest(self, from_s: float) -> int:
        """Took steps together since then."""
        before = [num for at_s, num in self.members if at_s < from_s][-1:]
        return min(before + [num for at_s, num in self.members if at_s >= from_s])


class Side(ABC):
    """A program that clusters are made of."""

    num_units: int
    """Of work in a step of all workers."""
    takes_over: bool
    """What one that dies was computing is computed by the others, in the same step."""
    plain_is_one: bool
    """Without fault tolerance one command starts all workers."""

    @abstractmethod
    def cluster(
        self, num_steps: int, num_workers: int, share: str = "even", plain: bool = False
    ) -> AbstractContextManager[Cluster]:
        """A cluster with a coordinator and no workers yet.

        Args:
            num_steps: of the run.
            num_workers: that are to come.
            share: `parallel.share`, where there is such a thing.
            plain: without fault tolerance; all its workers are there at once.
        """
