"""Elastic training while workers and the coordinator are killed, stopped and joined: what each fault costs.

Three workers on loopback, a core each where there are as many, and a step that computes for about 0.2 s on every one of
them. A stall is the longest time between two commits in the journal after the fault, less the median step before
it; after a kill also less what the survivors take over. After every run the journal must have each step once, and the
digest must be that of a plain run of the same configuration, but for `churn`, which is cut off.

    uv run python tests/benchmarks/faults.py
    uv run python tests/benchmarks/faults.py --only kill stop
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from common import (
    Table,
    build_model,
    fresh,
    interleave,
    mlx_train,
    parser,
    print_machine,
    workplace,
    write_config,
    write_rows,
)

from mlx_distributed.cli.output_dir import JOURNAL
from mlx_distributed.elastic.journal import parse
from mlx_distributed.elastic.protocol import CommitRecord, Epoch, EpochRecord

NUM_WORKERS = 3
NUM_ROWS, NUM_TOKENS = 4, 128
"""Of a micro-batch; three of them are a step, which computes for about 0.2 s then."""
WARMUP_STEPS = 5
KILLS = 3
"""Runs in which rank 0 is killed, and as many in which another one is."""
SHUT_S, HICCUP_S, AWAY_S = 25.0, 2.0, 5.0
CHURN_S, CHURN_EVERY_S = 104.0, 8.0
COMMIT_ROUNDS, COMMIT_STEPS = 3, 40
POLL_S = 0.002


class Watched:
    """The journal of a run, and when its lines came."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / JOURNAL
        self.epochs: list[tuple[float, Epoch]] = []
        self.commits: list[tuple[float, int]] = []
        """When, and which step."""
        self._num_seen, self._num_bytes = 0, 0

    def look(self) -> None:
        """Take in what is new."""
        if not self._path.exists() or self._path.stat().st_size == self._num_bytes:
            return
        data = self._path.read_bytes()
        now_s, self._num_bytes = time.monotonic(), len(data)
        records, _ = parse(data, str(self._path))
        for record in records[self._num_seen :]:
            if isinstance(record, EpochRecord):
                self.epochs.append((now_s, record.epoch))
            elif isinstance(record, CommitRecord):
                self.commits.append((now_s, record.outcome.step))
        self._num_seen = len(records)

    def until(self, step: int) -> None:
        """Watch until a step is taken."""
        while not self.commits or self.commits[-1][1] < step:
            self.pause()

    def rest(self, duration_s: float) -> None:
        """Watch for so long."""
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            self.pause()

    def pause(self) -> None:
        """Watch for a moment."""
        time.sleep(POLL_S)
        self.look()

    @property
    def names(self) -> list[str]:
        """Of the present members, in rank order."""
        return [seat.worker.name for seat in self.epochs[-1][1].seats]

    def gap_s(self, from_s: float, to_s: float = float("inf")) -> float:
        """The longest time between two commits of which the second was in this time."""
        times = [at_s for at_s, _ in self.commits]
        return max(b - a for a, b in pairwise(times) if from_s <= b <= to_s)

    def step_s(self, before_s: float) -> float:
        """The median step until then."""
        times = [at_s for at_s, step in self.commits if step > WARMUP_STEPS and at_s < before_s]
        return statistics.median(b - a for a, b in pairwise(times))

    def check(self) -> None:
        """Every step must have been taken once."""
        taken = [step for _, step in self.commits]
        if taken != list(range(1, len(taken) + 1)):
            raise SystemExit(f"steps were not taken once each: {taken}")


class Program:
    """A command of the program, in a session of its own, with what it prints in a file."""

    def __init__(self, output: TextIO, program: str, *arguments: str | Path) -> None:
        command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        self.output = Path(output.name)
        self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def workers(self) -> list[int]:
        """Process ids of its children, in the order in which they were started."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def join_string(self) -> str:
        """Wait for it."""
        while "--join " not in self.output.read_text(encoding="utf-8"):
            self.alive()
            time.sleep(POLL_S)
        return self.output.read_text(encoding="utf-8").partition("--join ")[2].split()[0]

    def alive(self) -> None:
        """End the benchmark where it has ended."""
        if self.process.poll() is not None:
            raise SystemExit(f"{self.process.args} has ended:\n{self.output.read_text(encoding='utf-8')}")

    def wait(self) -> None:
        """Wait for its end, which must be a success."""
        if self.process.wait():
            self.alive()


class Bench:
    """A model, data, and runs of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        data = write_rows(folder / "rows.json", num_rows=512, num_words=(NUM_TOKENS, NUM_TOKENS))
        self._config: dict[str, Any] = {
            "model": {"path": str(fresh(build_model, folder / "model", data, "0.7M"))},
            "method": "full",
            "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
            "train": {"global_batch_size": NUM_ROWS * 6, "micro_batch_size": NUM_ROWS, "device": "cpu"},
            "checkpoint": {"steps": None},
            "parallel": {"nproc": NUM_WORKERS},
        }
        self._digests: dict[int, str] = {}
        self._num_runs = 0

    def config(self, num_steps: int, elastic: bool = True, nproc: int = NUM_WORKERS, **settings: Any) -> Path:
        """A configuration file in a folder of its own."""
        self._num_runs += 1
        section = {"enabled": True, "listen": "127.0.0.1:0", **settings} if elastic else {}
        train = self._config["train"] | {"max_steps": num_steps}
        return write_config(
            self._folder / f"run-{self._num_runs}",
            self._config | {"train": train, "elastic": section, "parallel": {"nproc": nproc}},
        )

    @contextlib.contextmanager
    def start(self, file: Path, program: str = "mlx-train", *arguments: str | Path) -> Iterator[Program]:
        """A command; killed at the end with its children."""
        with (file.parent / f"output-{random.getrandbits(32)}.txt").open("w", encoding="utf-8") as output:
            started = Program(output, program, *(arguments or ("--config", file)))
        try:
            yield started
        finally:
            if started.process.poll() is None:
                for pid in (*started.workers, started.process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            started.process.wait()

    def check(self, trained: Path, num_steps: int) -> None:
        """What came of a run must have the bits of an undisturbed one."""
        if num_steps not in self._digests:
            file = self.config(num_steps, elastic=False)
            mlx_train(file)
            self._digests[num_steps] = digest(file.parent / "run")
        if digest(trained) != self._digests[num_steps]:
            raise SystemExit(f"{trained}: not the bits of the undisturbed run")


def digest(folder: Path) -> str:
    """Of weights and moments."""
    command = [str(Path(sys.executable).with_name("mlx-distributed")), "digest", str(folder)]
    return subprocess.check_output(command, text=True)


def kill(bench: Bench, table: Table) -> None:
    """`kill -9` of one worker: rank 0, or another one."""
    for what, rank in {"kill -9 of another": 1, "kill -9 of rank 0": 0}.items():
        stalls = []
        for _ in range(KILLS):
            file = bench.config(num_steps := 25)
            with bench.start(file) as run:
                watched = Watched(file.parent / "run")
                watched.until(12)
                watched.rest(random.random() * 0.2)
                index = int(watched.names[rank].rpartition("-")[2])
                killed_s = time.monotonic()
                os.kill(run.workers[index], signal.SIGKILL)
                watched.until(num_steps)
                run.wait()
            watched.check()
            step_s = watched.step_s(killed_s)
            # Two have to compute what three computed.
            due_s = step_s * NUM_WORKERS / (NUM_WORKERS - 1)
            stalls.append(max(watched.gap_s(killed_s) - due_s, 0.0))
            bench.check(file.parent / "run", num_steps)
        median_s, worst_s = statistics.median(stalls), max(stalls)
        table.print(
            what, f"{step_s:.3f}", f"{median_s:.2f}, worst {worst_s:.2f}", "0.5, worst 1", "each step taken once"
        )


def stop(bench: Bench, table: Table) -> None:
    """SIGSTOP for long, and for a moment."""
    for duration_s, goal in ((SHUT_S, "3.5"), (HICCUP_S, "2.3, none evicted")):
        # As long as it takes that the worker comes back before the end.
        file = bench.config(num_steps := int(duration_s / 0.25) + 40)
        with bench.start(file) as run:
            watched = Watched(file.parent / "run")
            watched.until(12)
            num_epochs, stopped_s = len(watched.epochs), time.monotonic()
            step_s = watched.step_s(stopped_s)
            pid = run.workers[int(watched.names[1].rpartition("-")[2])]
            os.kill(pid, signal.SIGSTOP)
            watched.rest(duration_s)
            num_evictions = sum(len(epoch.seats) < NUM_WORKERS for _, epoch in watched.epochs[num_epochs:])
            os.kill(pid, signal.SIGCONT)
            watched.until(num_steps)
            run.wait()
        watched.check()
        bench.check(file.parent / "run", num_steps)
        stall_s = watched.gap_s(stopped_s) - step_s
        table.print(f"SIGSTOP {duration_s:.0f} s", f"{step_s:.3f}", f"{stall_s:.2f}", goal, f"{num_evictions} evicted")


def away(bench: Bench, table: Table) -> None:
    """The coordinator is killed and comes back."""
    num_steps = 60
    file = bench.config(num_steps, min_workers=2)
    coordinate = ("coordinator", "--config", file)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(bench.start(file, "mlx-distributed", *coordinate))
        text = first.join_string()
        joined = [file.parent / f"joined-{number}" for number in range(2)]
        workers = [
            stack.enter_context(bench.start(file, "mlx-train", "--join", text, "--output-dir", folder))
            for folder in joined
        ]
        watched = Watched(file.parent / "run")
        watched.until(12)
        os.kill(first.process.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        step_s = watched.step_s(killed_s)
        watched.rest(AWAY_S)
        again = stack.enter_context(bench.start(file, "mlx-distributed", *coordinate))
        again.join_string()
        down_s = time.monotonic() - killed_s
        watched.until(num_steps)
        for program in (*workers, again):
            program.wait()
    watched.check()
    leader = next(folder for folder in joined if (folder / "final").exists())
    bench.check(leader, num_steps)
    stall_s = watched.gap_s(killed_s) - step_s
    what = f"coordinator away {down_s:.1f} s"
    table.print(what, f"{step_s:.3f}", f"{stall_s:.2f}", f"{down_s + 1:.1f}", "no worker has ended")


def join(bench: Bench, table: Table) -> None:
    """A worker joins two others."""
    num_steps = 60
    file = bench.config(num_steps, nproc=2)
    with bench.start(file) as run:
        watched = Watched(file.parent / "run")
        text = run.join_string()
        watched.until(12)
        begun_s = time.monotonic()
        step_s = watched.step_s(begun_s)
        arguments = ("--join", text, "--output-dir", file.parent / "joined")
        with bench.start(file, "mlx-train", *arguments) as newcomer:
            while len(watched.names) < NUM_WORKERS:
                watched.pause()
                run.alive()
            entered_s, entered = time.monotonic(), watched.commits[-1][1]
            watched.until(min(entered + 5, num_steps))
            watched.until(num_steps)
            newcomer.wait()
            run.wait()
    watched.check()
    bench.check(file.parent / "run", num_steps)
    loading_s, entering_s = (
        watched.gap_s(*times) - step_s for times in ((begun_s, entered_s), (entered_s, entered_s + 3))
    )
    found = f"{max(loading_s, entering_s):.2f}"
    table.print("a worker joins", f"{step_s:.3f}", found, "0.3", f"entering alone {entering_s:.2f}, at step {entered}")


def churn(bench: Bench, table: Table) -> None:
    """Again and again a random worker is killed, and another one joins at once."""
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:
        file = bench.config(2000, min_workers=1)
        coordinator = stack.enter_context(bench.start(file, "mlx-distributed", "coordinator", "--config", file))
        text, watched = coordinator.join_string(), Watched(file.parent / "run")

        def start(number: int) -> Program:
            arguments = ("--join", text, "--output-dir", file.parent / f"joined-{number}")
            return stack.enter_context(bench.start(file, "mlx-train", *arguments))

        workers = [start(number) for number in range(NUM_WORKERS)]
        while not watched.epochs or len(watched.names) < NUM_WORKERS:
            watched.pause()
        watched.until(watched.commits[-1][1] + 30 if watched.commits else 30)
        begun_s, num_before = time.monotonic(), len(watched.commits)
        times = [at_s for at_s, _ in watched.commits[-25:]]
        step_s = statistics.median(b - a for a, b in pairwise(times))
        for number in range(int(CHURN_S / CHURN_EVERY_S)):
            place = rng.randrange(NUM_WORKERS)
            victim = workers[place]
            for pid in (*victim.workers, victim.process.pid):
                os.kill(pid, signal.SIGKILL)
            workers[place] = start(NUM_WORKERS + number)
            watched.rest(begun_s + (number + 1) * CHURN_EVERY_S - time.monotonic())
        num_steps, duration_s = len(watched.commits) - num_before, time.monotonic() - begun_s
    watched.check()
    share = num_steps * step_s / duration_s
    table.print(
        f"churn, {duration_s:.0f} s", f"{step_s:.3f}", f"{share:.0%} of the ideal", "75 %", "each step taken once"
    )


def commit(bench: Bench, table: Table) -> None:
    """What a commit adds to a step: elastic and plain runs, interleaved."""

    def side(elastic: bool) -> list[float]:
        file = bench.config(COMMIT_STEPS, elastic=elastic)
        run = mlx_train(file, range(os.cpu_count() or 1))
        if elastic:
            bench.check(file.parent / "run", COMMIT_STEPS)
        return [step["perf/step_s"] for step in run.steps[WARMUP_STEPS:]]

    sides = {"plain": lambda _: side(False), "elastic": lambda _: side(True)}
    results = interleave(sides, COMMIT_ROUNDS, Path())
    plain_s, elastic_s = (statistics.median(s for run in results[name] for s in run) for name in sides)
    added_ms = 1000.0 * (elastic_s - plain_s)
    table.print("commit", f"{plain_s:.3f}", f"{added_ms:+.1f} ms", "5 ms", f"{elastic_s / plain_s - 1:+.1%}")


ROWS = {"kill": kill, "stop": stop, "away": away, "join": join, "churn": churn, "commit": commit}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    options = args.parse_args()
    with workplace(options.blas) as folder:
        print_machine()
        bench = Bench(folder)
        table = Table("what" + " " * 20, "step, s", "stall, s" + " " * 10, "goal, s" + " " * 10, "besides" + " " * 26)
        for name in options.only:
            ROWS[name](bench, table)


if __name__ == "__main__":
    main()
