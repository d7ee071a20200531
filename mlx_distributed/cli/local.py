"""Several workers on this machine: start them, introduce them to each other, and end together.

The parent never imports MLX. A worker is a fresh process (a fork of a process that has used MLX hangs), in a session of
its own, so that Ctrl-C reaches the parent alone and is passed on once.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import SIGNALS
from mlx_distributed.cli.output_dir import RunRecord
from mlx_distributed.errors import ConfigError, MlxDistributedError

GRACE_S = 30.0
"""How long rank 0 of a run may take to notice that another worker has failed. Then it says that it saves, which has no
limit."""
LAST_S = 2.0
"""How long the others may take to end when the run has failed."""
OUT_OF_MEMORY = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
MAX_INTERRUPTS = 3
"""So many Ctrl-C end workers that do not listen."""

ONE_MACHINE: Mapping[str, Any] = {
    "first_rank": 0, "host": "127.0.0.1", "machines": [], "identity": None, "quiet": False
}  # fmt: skip
"""Where the workers of a group are that is on one machine."""

MEMORY_HINT = (
    "hint: a worker that is ended so has often run out of memory; less is taken with "
    "train.gradient_checkpointing=true, a smaller train.micro_batch_size or train.micro_batch_tokens, or "
    "optimizer.shard=true with several workers, and mlx-distributed plan says how much. --resume goes on from the last "
    "checkpoint"
)
OPENBLAS_HINT = (
    "hint: OpenBLAS is not installed, and the matrix product that comes with MLX for Linux is many times slower; "
    "on Debian and Ubuntu: apt-get install libopenblas0-pthread"
)


@dataclass
class Worker:
    """One started worker."""

    rank: int
    process: subprocess.Popen[bytes]
    control: Control
    log_file: Path | None
    error: str | None = None
    """What it said before it ended."""
    dismissed: bool = False
    """It was ended from here, for what another one did."""
    name: str = ""
    """In an elastic run."""

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.process.poll() is None:
            self.dismissed = True
            self.process.kill()
            self.process.wait()

    @property
    def may_have_run_out_of_memory(self) -> bool:
        """Whether it has ended as the system ends a process that it has no memory for, or as MLX does on a CPU; others
        may have killed it all the same."""
        return not self.dismissed and self.process.returncode in OUT_OF_MEMORY

    def ending(self) -> str | None:
        """How it failed, where it could not say so itself."""
        status = self.process.returncode
        if self.error is not None or self.dismissed or status in (0, INTERRUPTED):
            return None
        if status < 0:
            return f"worker {self.name or self.rank} was ended by {signal.Signals(-status).name}"
        where = f"; see {self.log_file}" if self.log_file else ""
        return f"worker {self.name or self.rank} ended with status {status}{where}"


def find_openblas() -> str | None:
    """Path or soname of an OpenBLAS that can be preloaded."""
    for folder in (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib")):
        for pattern in ("*/openblas-pthread/libopenblas.so.0", "*/libopenblas.so.0", "libopenblas.so.0"):
            for path in sorted(folder.glob(pattern)):
                return str(path)
    from ctypes.util import find_library

    return find_library("openblas")


def worker_environment(environ: Mapping[str, str], platform: str) -> tuple[dict[str, str], str | None]:
    """The environment of a worker, and a hint for the user or None. What the user has set is left alone."""
    env = dict(environ)
    # One thread of BLAS each: more do not help small models, and workers would take the cores from each other.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        env.setdefault(name, "1")
    # Every worker tokenises with threads of its own otherwise.
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # gRPC reports a connection that ends on stderr by itself; our errors say it better.
    env.setdefault("GRPC_VERBOSITY", "NONE")
    if platform == "linux":
        # By itself glibc keeps freed buckets for each thread that had some, 200 MB for a worker of 50 M parameters.
        # To give every block back at once (MALLOC_MMAP_THRESHOLD_) made a step half as long again, all page faults.
        env.setdefault("MALLOC_ARENA_MAX", "1")
    hint = None
    if platform == "linux" and "LD_PRELOAD" not in env:
        openblas = find_openblas()
        if openblas is None:
            hint = OPENBLAS_HINT
        else:
            env["LD_PRELOAD"] = openblas
    return env, hint


def training_job(record: RunRecord, resume: str | None) -> dict[str, Any]:
    """What all workers of a run are told."""
    same = {"config_file": str(record.config_file), "run_id": record.run_id, "wandb_id": record.wandb_id}
    return {**same, "resume": resume, "eval_only": False}


def worker_jobs(
    job: Mapping[str, Any], num_workers: int, secret: str, place: Mapping[str, Any] = ONE_MACHINE
) -> list[dict[str, Any]]:
    """What each worker of this machine is told, in a run whose group stays as it is.

    Args:
        job: what all of them are told.
        num_workers: on this machine.
        secret: by which ranks know each other.
        place: where they are in the group.
    """
    return [{**job, "rank": rank, "secret": secret, "place": dict(place)} for rank in range(num_workers)]


def log_files(logs: Path, num_workers: int) -> list[Path | None]:
    """Where the output of each worker goes, in this folder; that of the first one stays on the console."""
    logs.mkdir(exist_ok=True)
    return [None if rank == 0 else logs / f"rank-{rank}.log" for rank in range(num_workers)]


class LocalWorkers:
    """Workers of one command, started on this machine; Ctrl-C is passed on to them until `close`.

    Args:
        jobs: what each worker is told, in rank order.
        log_files: where the output of each worker goes; None leaves it on the console.
        env: environment of the workers.
        debug: have them print tracebacks.
        module: the program of a worker.
    """

    def __init__(
        self,
        jobs: Sequence[Mapping[str, Any]],
        log_files: Sequence[Path | None],
        env: Mapping[str, str],
        debug: bool = False,
        module: str = "mlx_distributed.cli.worker",
    ) -> None:
        self._module, self._flags = module, ["--debug"] if debug else []
        self._jobs, self._log_files, self._env = list(jobs), log_files, env
        self._num_interrupts = 0
        self._on_sigterm = signal.SIGINT
        """What SIGTERM is passed on as: the two ask for the same, but of a worker that joined a run."""
        self._workers: list[Worker] = []
        self._previous = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
        with waiting_signals():
            for rank in range(len(jobs)):
                self._workers.append(self._begin(rank))

    def _begin(self, rank: int) -> Worker:
        """Start the worker of a job, and tell it what it is to do."""
        worker = self._start(rank, self._log_files[rank], self._env)
        worker.control.send(**self._jobs[rank])
        return worker

    def close(self) -> None:
        """End those that have not ended."""
        for worker in self._workers:
            worker.kill()
            worker.control.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _start(self, rank: int, log_file: Path | None, env: Mapping[str, str], pass_fds: Sequence[int] = ()) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            output = None if log_file is None else log_file.open("ab")
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, str(theirs.fileno()), *self._flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                pass_fds=[theirs.fileno(), *pass_fds],
                start_new_session=True,
                env=dict(env),
            )
            if output is not None:
                output.close()
        return Worker(rank, process, Control(ours), log_file)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += 1
        passed_on = self._on_sigterm if number == signal.SIGTERM else signal.SIGINT
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(passed_on if self._num_interrupts < MAX_INTERRUPTS else signal.SIGKILL)


@contextlib.contextmanager
def waiting_signals() -> Iterator[None]:
    """While workers are started. They inherit the mask: what is sent before one can handle a signal waits for that. And
    a signal of ours waits until there is somebody to pass it on to."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class LocalGroup(LocalWorkers):
    """A group of workers that know each other, and end together.

    Args:
        jobs, log_files, env, debug, module: as of `LocalWorkers`.
        grace_s: how long rank 0 may take to notice that another worker has failed.
        on_message: is given what rank 0 says in between.
    """

    def __init__(
        self,
        jobs: Sequence[Mapping[str, Any]],
        log_files: Sequence[Path | None],
        env: Mapping[str, str],
        debug: bool = False,
        module: str = "mlx_distributed.cli.worker",
        grace_s: float = GRACE_S,
        on_message: Callable[[Mapping[str, Any]], None] = lambda message: None,
    ) -> None:
        self._grace_s, self._on_message = grace_s, on_message
        super().__init__(jobs, log_files, env, debug, module)

    def run(self) -> int:
        """Wait for the end of all workers; returns the exit status of the run."""
        try:
            if self._introduce():
                self._wait()
            self._end()
        finally:
            self.close()
        return self._report()

    def train(self) -> int:
        """As `run`, of workers that train; where one may have run out of memory, people are told what takes less."""
        status = self.run()
        if any(worker.may_have_run_out_of_memory for worker in self._workers) and not self._num_interrupts:
            print(MEMORY_HINT, file=sys.stderr)
        return status

    def _introduce(self) -> bool:
        """Collect the address of every worker and tell all of them all; whether every worker had one."""
        addresses = []
        for worker in self._workers:
            message = worker.control.receive() or {}
            worker.error = message.get("error")
            if "address" not in message:
                for waiting in self._workers:
                    waiting.dismissed = waiting is not worker
                    waiting.control.hang_up()
                return False
            addresses.append(message["address"])
        try:
            of_all = self._all_addresses(addresses)
        except MlxDistributedError as error:
            for worker in self._workers:
                worker.dismissed = True
                worker.control.hang_up()
            self._workers[0].error = str(error)
            return False
        for worker in self._workers:
            worker.control.send(addresses=of_all)
        return True

    def _all_addresses(self, here: list[str]) -> list[str]:
        """Of all workers of the group, given those on this machine. May raise MlxDistributedError."""
        return here

    def _wait(self) -> None:
        """Until rank 0 has ended; where another one has failed, rank 0 must soon say that it saves, or end."""
        first, failed_s, saving = self._workers[0], None, False
        while first.process.poll() is None:
            if failed_s is None and self._has_failed():
                failed_s = time.monotonic()
            if failed_s is not None and not saving and time.monotonic() - failed_s > self._grace_s:
                return
            if first.control.heard(0.1):
                message = first.control.receive()
                if message is None:
                    first.process.wait()
                else:
                    saving = saving or "saving" in message
                    self._hear(first, message)

    def _has_failed(self) -> bool:
        """Whether a worker has."""
        return any(worker.process.poll() not in (None, 0) for worker in self._workers)

    def _end(self) -> None:
        """End the others: in peace they end by themselves."""
        if self._workers[0].process.poll() != 0:
            limit_s = time.monotonic() + LAST_S
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=max(limit_s - time.monotonic(), 0.0))
                worker.kill()
        for worker in self._workers:
            worker.process.wait()
            while (message := worker.control.receive()) is not None:
                self._hear(worker, message)

    def _hear(self, worker: Worker, message: Mapping[str, Any]) -> None:
        worker.error = message.get("error", worker.error)
        if worker.rank == 0:
            self._on_message(message)

    def _report(self) -> int:
        """Say on stderr what went wrong, once; returns the exit status."""
        interrupted = {INTERRUPTED, -signal.SIGINT, -signal.SIGTERM} if self._num_interrupts else {INTERRUPTED}
        statuses = [worker.process.returncode for worker in self._workers]
        failed = [status for status in statuses if status not in {0, *interrupted}]
        if statuses[0] in interrupted or (not failed and interrupted & set(statuses)):
            for note in {worker.error for worker in self._workers if worker.error and "interrupted" in worker.error}:
                print(note, file=sys.stderr)
            return INTERRUPTED
        # All of them say the same, each from where it stands. Who refused something says it best, then the first.
        told = sorted(self._workers, key=lambda worker: worker.process.returncode != ConfigError.exit_status)
        errors = [worker.error for worker in told if worker.error][:1]
        for line in [*errors, *filter(None, (worker.ending() for worker in self._workers))]:
            print(f"error: {line}", file=sys.stderr)
        return 0 if not failed else ConfigError.exit_status if ConfigError.exit_status in failed else 1
