"""The workers of an elastic run on this machine: each may end by itself, and the others go on."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import SIGNALS
from mlx_distributed.cli.local import LocalWorkers, Worker, log_files, waiting_signals, worker_environment
from mlx_distributed.cli.machine.interfaces import address_of, advice
from mlx_distributed.cli.machine.machine import this_machine
from mlx_distributed.cli.output_dir import RunRecord, config_file
from mlx_distributed.config import Config
from mlx_distributed.elastic.protocol import End, Outcome
from mlx_distributed.errors import ConfigError

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity

WORKER = "mlx_distributed.cli.worker"
MAX_HALVINGS = 3
"""So often a worker that has run out of memory is started again, each time with half of what it computes at a time."""


class Enrolment(NamedTuple):
    """What the first worker has found out of the run."""

    num_steps: int
    config_digest: str
    begins_with: Outcome
    """What its state is the state of."""


class Place(NamedTuple):
    """What all workers of a command have in common."""

    names: str
    """What their names begin with."""
    host: str
    """Address of the interface on which they listen."""
    token: str
    identity: Identity | None
    joined: bool = False
    """They come to a run that was started elsewhere."""
    quiet: bool = False
    """Whoever reads what they say hears it from rank 0 already."""


class Crew(LocalWorkers):
    """Started workers. They load data and model, enroll, and are told where the coordinator is.

    Args:
        jobs: what each worker is told.
        log_files, env, debug, module: as of `LocalWorkers`.
        halves: start a worker again that was ended by `local.OUT_OF_MEMORY`, while others know the state of the run.
    """

    def __init__(
        self,
        jobs: Sequence[Mapping[str, Any]],
        log_files: Sequence[Path | None],
        env: Mapping[str, str],
        debug: bool = False,
        module: str = WORKER,
        halves: bool = False,
    ) -> None:
        with contextlib.ExitStack() as stack:
            # Whoever leads the run speaks on the console, also when the worker is lost whose standard output it is.
            self._console: int | None = None
            with contextlib.suppress(OSError, ValueError):  # There is none.
                self._console = os.dup(sys.stdout.fileno())
                stack.callback(os.close, self._console)
            told = [self._told(job, log_file) for job, log_file in zip(jobs, log_files, strict=True)]
            super().__init__(told, log_files, env, debug, module)
            self._closing = stack.pop_all()
        if all(job["seat"]["joined"] for job in jobs):
            self._on_sigterm = signal.SIGTERM
        self._living = list(self._workers)
        self._enrolled: dict[int, Enrolment] = {}
        self._coordinator: str | None = None
        """Its address, once those who have enrolled are told."""
        self._halves = halves
        self._said: set[str] = set()

    def close(self) -> None:
        super().close()
        self._closing.close()

    def _begin(self, rank: int) -> Worker:
        worker = super()._begin(rank)
        worker.name = self._jobs[rank]["seat"]["name"]
        return worker

    def _start(self, rank: int, log_file: Path | None, env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> Worker:
        if log_file is not None and self._console is not None:
            pass_fds = [*pass_fds, self._console]
        return super()._start(rank, log_file, env, pass_fds)

    def _told(self, job: Mapping[str, Any], log_file: Path | None) -> dict[str, Any]:
        """A job, and where its worker finds the console if its standard output is something else."""
        console = None if log_file is None else self._console
        return {**job, "seat": {**job["seat"], "console": console}}

    @property
    def enrolment(self) -> Enrolment | None:
        """Of the first worker, once all that live have enrolled and until they are answered."""
        if self._coordinator or any(worker.rank not in self._enrolled for worker in self._living):
            return None
        return self._enrolled.get(0)

    @property
    def num_interrupts(self) -> int:
        return self._num_interrupts

    def answer(self, coordinator: str) -> None:
        """Tell all who have enrolled where the coordinator is."""
        self._coordinator = coordinator
        for worker in self._living:
            worker.control.send(coordinator=coordinator)

    def watch(self, timeout_s: float) -> bool:
        """Look after them for so long; whether any is left. One that has ended is spoken for on stderr."""
        for worker in list(self._living):
            while worker.control.heard(timeout_s / len(self._living)):
                message = worker.control.receive()
                if message is None:
                    worker.process.wait()
                    break
                self._hear(worker, message)
            if worker.process.poll() is not None:
                self._bury(worker)
        return bool(self._living)

    @property
    def statuses(self) -> list[int]:
        """Of those that have ended."""
        return [status for worker in self._workers if (status := worker.process.poll()) is not None]

    def say(self, error: str) -> None:
        """Print an error on stderr, unless it was said before."""
        if error not in self._said:
            self._said.add(error)
            print(f"error: {error}", file=sys.stderr, flush=True)

    def _hear(self, worker: Worker, message: Mapping[str, Any]) -> None:
        worker.error = message.get("error", worker.error)
        if "num_steps" in message:
            begins_with = Outcome(*message["begins_with"])
            self._enrolled[worker.rank] = Enrolment(message["num_steps"], message["config_digest"], begins_with)
            if self._coordinator:  # It was started again.
                worker.control.send(coordinator=self._coordinator)

    def _bury(self, worker: Worker) -> None:
        while (message := worker.control.receive()) is not None:
            self._hear(worker, message)
        self._living.remove(worker)
        if worker.process.returncode == INTERRUPTED:
            if worker.error and worker.error not in self._said:
                self._said.add(worker.error)
                print(worker.error, file=sys.stderr, flush=True)
        elif worker.error:
            self.say(worker.error)
        elif (ending := worker.ending()) and not (self._num_interrupts and worker.process.returncode in _KILLED):
            self.say(f"{ending}; the others go on" if self._coordinator and self._living else ending)
            if self._halves and worker.may_have_run_out_of_memory:
                self._start_again(worker)
        if worker.rank == 0 and not self._coordinator:
            # Nobody would say what there is to coordinate.
            for other in self._living:
                other.kill()

    def _start_again(self, worker: Worker) -> None:
        """With half of what it has computed at a time, if somebody is left who knows the state of the run."""
        job = self._jobs[worker.rank]
        halvings, joined = job["halvings"] + 1, job["seat"]["joined"]
        if self._coordinator is None or self._num_interrupts or not (self._living or joined):
            return
        if halvings > MAX_HALVINGS:
            self.say(f"worker {worker.name} is not started again, as it has died {halvings} times")
            return
        print(
            f"worker {worker.name} may have run out of memory: it is started again, to compute micro-batches in "
            f"{2**halvings} parts",
            flush=True,
        )
        file = config_file(Path(job["config_file"]).parent)
        seat = {**job["seat"], "first": False}
        self._jobs[worker.rank] = {**job, "halvings": halvings, "config_file": str(file), "seat": seat}
        worker.control.close()
        with waiting_signals():
            self._workers[worker.rank] = again = self._begin(worker.rank)
        self._living.append(again)


_KILLED = tuple(-number for number in SIGNALS)


def exit_status(statuses: Sequence[int], num_interrupts: int, end: End | None) -> int:
    """The exit status of a command.

    Args:
        statuses: of its workers.
        num_interrupts: how often it was interrupted itself.
        end: of the run, None where it goes on elsewhere or was stopped.
    """
    interrupted = {INTERRUPTED, *_KILLED} if num_interrupts else {INTERRUPTED}
    if interrupted.intersection(statuses):
        return INTERRUPTED
    if end is not None:
        return int(end.failed)
    if 0 in statuses:
        return 0
    return ConfigError.exit_status if ConfigError.exit_status in statuses else 1


def hostname() -> str:
    """Of this machine, without its domain."""
    return socket.gethostname().partition(".")[0] or "worker"


def start_crew(
    config: Config, record: RunRecord, place: Place, resume: str | None, debug: bool, module: str = WORKER
) -> Crew:
    """Start `parallel.nproc` workers of a run.

    Args:
        config: of the run.
        record: of the run.
        place: where and as what they take part.
        resume: what the first of them goes on from; None begins anew.
        debug: have them print tracebacks.
        module: the program of a worker.
    """
    env, hint = worker_environment(os.environ, sys.platform)
    if hint:
        print(hint, file=sys.stderr)
    machine = this_machine()
    for line in advice(address_of(place.host), machine.interfaces(), machine.on_battery()):
        print(f"warning: {line}", file=sys.stderr)
    port, nproc = config.parallel.port, config.parallel.nproc
    identity = asdict(place.identity) if place.identity else None
    jobs = [
        {
            "config_file": str(record.config_file),
            "rank": rank,
            "run_id": record.run_id,
            "wandb_id": record.wandb_id,
            "resume": resume,
            "log": not place.quiet,
            "halvings": 0,
            "seat": {
                "name": f"{place.names}-{rank}",
                "listen": f"{place.host}:{port + rank if port else 0}",
                "token": place.token,
                "identity": identity,
                "joined": place.joined,
                "first": rank == 0,
            },
        }
        for rank in range(nproc)
    ]
    halves = config.train.memory_budget is not None
    return Crew(jobs, log_files(config.output_dir / "logs", nproc), env, debug, module, halves)
