"""Training while workers and the coordinator are killed, stopped and joined: what each fault costs, beside torchft.

Three workers on loopback, each a command of its own, as is the coordinator. A step computes for 0.2 s: a little of it
arithmetic, and the rest is slept through, so that a worker does not need a core of its own. Where nothing else is said,
`found` is a stall: the longest time between two steps after the fault, less the median step before it; after a kill
also less what the survivors take over, and where the coordinator is away also less the time for which it is. `in vain`
is finished work of workers that nothing was done to, which had to be done again or was left out.

Of this program every run has to end with each step in the journal once, every row of the data trained once in each
pass over it, by the journal and the metrics, and the bits of an undisturbed run: anything else ends the benchmark.

`churn` kills a random worker and starts another one, again and again; `found` is the share of the samples that three
workers would have trained in that time. `commit` is what fault tolerance adds to a step: an elastic run after a plain
one, or torchft after PyTorch's DDP. `speeds` has one worker that is twice as fast as two others, with
`parallel.share=speed`: the rate of all together by the sum of what each makes alone.

    uv run python tests/benchmarks/faults.py
    uv run python tests/benchmarks/faults.py --only kill stop --repeat 5
    uv run python tests/benchmarks/faults.py --only away --away-s 60
    uv run python tests/benchmarks/faults.py --sides here torchft --torchft-python ~/torchft/bin/python

The last one needs an environment in which `pip install torch torchft-nightly` was done.
"""

from __future__ import annotations

import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import MODELS, Table, parser, print_machine, workplace
from fault_cluster import Cluster, RunOverError, Side
from fault_ours import Ours
from fault_torchft import TorchftSide

NUM_WORKERS = 3
STEP_S = 0.2
"""That three workers compute in a step."""
WARMUP_STEPS = 10
COMMIT_STEPS, SPEED_STEPS = 60, 40
ALONE_STEPS = 12
SHUT_S, HICCUP_S = 25.0, 2.0
CHURN_EVERY_S = 8.0
SIDES = ("here", "torchft")


@dataclass(frozen=True)
class Found:
    """By one run."""

    step_s: float
    """The median step of three workers that nothing happens to."""
    figure: float
    in_vain: str = "-"
    besides: str = ""


@dataclass(frozen=True)
class Row:
    """Of the table."""

    group: str
    what: str
    goal: str
    play: Callable[[Side], Found]
    pattern: str = "{:.2f} s"
    worst: Callable[[Sequence[float]], float] = max


def unit_s(side: Side, speed: float = 1.0, num_workers: int = NUM_WORKERS) -> float:
    """What a unit of work is to take, such that so many workers compute for `STEP_S` in a step."""
    return STEP_S * num_workers / side.num_units / speed


def begin(cluster: Cluster, side: Side, num_workers: int = NUM_WORKERS) -> float:
    """Start workers and have them take a few steps together; the median step."""
    for _ in range(num_workers):
        cluster.add(unit_s(side))
    cluster.until_together(num_workers)
    begun_s = cluster.members[-1][0]
    cluster.more(WARMUP_STEPS)
    return cluster.step_s(begun_s)


def ended(cluster: Cluster, step_s: float, figure: float, besides: str = "") -> Found:
    """Have the run come to its end, and look at what came of it."""
    cluster.end()
    verdict = cluster.verdict()
    return Found(step_s, figure, cluster.thrown_away(), "; ".join(filter(None, (besides, verdict))))


def kill(side: Side, rank: int) -> Found:
    """`kill -9` of one worker."""
    with side.cluster(50, NUM_WORKERS) as cluster:
        step_s = begin(cluster, side)
        cluster.rest(random.random() * step_s)
        killed_s = time.monotonic()
        cluster.kill(cluster.rank(rank))
        cluster.until_step(cluster.num_steps)
        # Two have to compute what three computed, where they do.
        due_s = step_s * (NUM_WORKERS / (NUM_WORKERS - 1) if side.takes_over else 1.0)
        return ended(cluster, step_s, max(cluster.gap_s(killed_s) - due_s, 0.0))


def stop(side: Side, duration_s: float) -> Found:
    """SIGSTOP of one worker, which comes back before the end."""
    with side.cluster(int(duration_s / STEP_S) + 50, NUM_WORKERS) as cluster:
        step_s = begin(cluster, side)
        stopped_s = time.monotonic()
        with cluster.stopped(cluster.rank(1)):
            cluster.rest(duration_s)
        continued_s = time.monotonic()
        cluster.more(3)
        num_evicted = NUM_WORKERS - cluster.fewest(stopped_s)
        stall_s = cluster.gap_s(stopped_s) - step_s
        if num_evicted:
            cluster.until_together(NUM_WORKERS)
            besides = f"{num_evicted} evicted, back after {cluster.members[-1][0] - continued_s:.1f} s"
        return ended(cluster, step_s, stall_s, besides if num_evicted else "none evicted")


def away(side: Side, duration_s: float) -> Found:
    """The coordinator is killed and comes back."""
    with side.cluster(40, NUM_WORKERS) as cluster:
        step_s = begin(cluster, side)
        killed_s = time.monotonic()
        cluster.coordinator.signal(signal.SIGKILL)
        cluster.rest(duration_s)
        cluster.coordinate()
        down_s = time.monotonic() - killed_s
        cluster.until_step(cluster.num_steps)
        return ended(cluster, step_s, cluster.gap_s(killed_s) - step_s - down_s, f"away for {down_s:.1f} s")


def join(side: Side) -> Found:
    """A worker joins two others."""
    with side.cluster(90, NUM_WORKERS) as cluster:
        step_s = begin(cluster, side, NUM_WORKERS - 1)
        begun_s = time.monotonic()
        cluster.add(unit_s(side))
        cluster.until_together(NUM_WORKERS)
        entered_s = cluster.members[-1][0]
        cluster.more(5)
        loading_s, entering_s = (
            cluster.gap_s(*times) - step_s for times in ((begun_s, entered_s), (entered_s, math.inf))
        )
        besides = f"in after {entered_s - begun_s:.1f} s, entering alone {entering_s:.2f} s"
        return ended(cluster, step_s, max(loading_s, entering_s), besides)


def churn(side: Side, duration_s: float) -> Found:
    """Again and again a random worker is killed, and another one joins at once."""
    rng = random.Random(0)
    with side.cluster(WARMUP_STEPS + 10 + math.ceil(duration_s / STEP_S), NUM_WORKERS) as cluster:
        step_s = begin(cluster, side)
        begun_s, num_kills = time.monotonic(), int(duration_s / CHURN_EVERY_S)
        for number in range(num_kills):
            cluster.kill(rng.choice(cluster.workers))
            cluster.add(unit_s(side))
            cluster.rest(begun_s + (number + 1) * CHURN_EVERY_S - time.monotonic())
        share = cluster.num_done(begun_s) * step_s / (time.monotonic() - begun_s)
        return ended(cluster, step_s, share, f"{num_kills} kills")


def commit(side: Side) -> Found:
    """What fault tolerance adds to a step."""
    steps_s = []
    for plain in (True, False):
        with side.cluster(COMMIT_STEPS, NUM_WORKERS, plain=plain) as cluster:
            for _ in range(1 if plain and side.plain_is_one else NUM_WORKERS):
                cluster.add(unit_s(side))
            if not plain:
                cluster.until_together(NUM_WORKERS)
            begun_s = cluster.commits[-1][0] if cluster.commits else 0.0
            cluster.end()
            cluster.verdict()
            steps_s.append(cluster.step_s(begun_s))
    added_s = steps_s[1] - steps_s[0]
    return Found(steps_s[1], 1000.0 * added_s, besides=f"{added_s / steps_s[0]:+.1%}")


def speeds(side: Side) -> Found:
    """One worker that is twice as fast as two others."""

    def steps_per_s(num_steps: int, *speeds: float) -> float:
        with side.cluster(num_steps, len(speeds), share="speed") as cluster:
            for speed in speeds:
                cluster.add(unit_s(side, speed))
            cluster.until_together(len(speeds))
            cluster.more(WARMUP_STEPS if len(speeds) > 1 else 2)
            (begun_s, first), num_steps = cluster.commits[-1], cluster.num_steps
            cluster.end()
            cluster.verdict()
            return (num_steps - first) / (cluster.commits[-1][0] - begun_s)

    # Together they are as fast as four of the slow ones.
    slow, fast = NUM_WORKERS / 4, 2 * NUM_WORKERS / 4
    alone = [steps_per_s(ALONE_STEPS, fast), *[steps_per_s(ALONE_STEPS, slow)] * 2]
    together = steps_per_s(SPEED_STEPS, slow, fast, slow)
    besides = f"alone {' + '.join(f'{rate:.2f}' for rate in alone)}, together {together:.2f} steps/s"
    return Found(1 / together, together / sum(alone), besides=besides)


def rows(away_s: Sequence[float], churn_s: float) -> list[Row]:
    """Of the table."""
    return [
        Row("kill", "kill -9 of another", "0.5, worst 1", partial(kill, rank=1)),
        Row("kill", "kill -9 of rank 0", "0.5, worst 1", partial(kill, rank=0)),
        Row("stop", f"SIGSTOP {SHUT_S:g} s", "3.5", partial(stop, duration_s=SHUT_S)),
        Row("stop", f"SIGSTOP {HICCUP_S:g} s", "2.3, none out", partial(stop, duration_s=HICCUP_S)),
        *(Row("away", f"coordinator away {s:g} s", "1", partial(away, duration_s=s)) for s in away_s),
        Row("join", "a worker joins", "0.3", join),
        Row("churn", f"churn, {churn_s:g} s", "75 %", partial(churn, duration_s=churn_s), "{:.0%}", min),
        Row("commit", "commit", "5 ms", commit, "{:+.1f} ms"),
        Row("speeds", "speeds 2 : 1 : 1", "95 %", speeds, "{:.1%}", min),
    ]


def measure(row: Row, side: Side, repeat: int) -> tuple[str, ...]:
    """The cells of a row."""
    try:
        found = [row.play(side) for _ in range(repeat)]
    except RunOverError as error:
        if isinstance(side, Ours):
            raise SystemExit(f"{row.what}: {error}") from None
        lines = str(error).strip().splitlines()
        return "-", "run over", "", row.goal, "-", f"{lines[0].partition(':')[0]}: {lines[-1][:60]}"
    figures = [each.figure for each in found]
    median, worst = (row.pattern.format(figure) for figure in (statistics.median(figures), row.worst(figures)))
    step_s = statistics.median(each.step_s for each in found)
    in_vain = ", ".join(dict.fromkeys(each.in_vain for each in found))
    return f"{step_s:.3f}", median, worst if repeat > 1 else "", row.goal, in_vain, found[-1].besides


def main() -> None:
    args = parser(__doc__)
    groups = list(dict.fromkeys(row.group for row in rows([0.0], 0.0)))
    args.add_argument("--only", nargs="+", choices=groups, default=groups, help="default: all")
    args.add_argument("--repeat", type=int, default=1, help="runs of every row; the median and the worst are printed")
    args.add_argument("--away-s", type=float, nargs="+", default=[5.0, 60.0], help="default: 5 60")
    args.add_argument("--churn-s", type=float, default=104.0, help="default: 104")
    args.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:1], help="default: here")
    args.add_argument("--torchft-python", type=Path, metavar="FILE", help="Python of an environment with torchft")
    args.add_argument("--model", choices=MODELS, default="0.1M", help="number of parameters (default: 0.1M)")
    options = args.parse_args()
    if ("torchft" in options.sides) != (options.torchft_python is not None):
        args.error("--sides torchft and --torchft-python go together")
    with workplace(options.blas) as folder:
        print_machine()
        sides: dict[str, Side] = {"here": Ours(folder, options.model)} if "here" in options.sides else {}
        if options.torchft_python is not None:
            torchft = TorchftSide(folder, options.torchft_python.absolute(), options.model)
            print(torchft.versions, end="\n\n")
            sides["torchft"] = torchft
        table = Table(
            "what" + " " * 20, "side", "step, s", "found", "worst", "goal" + " " * 8, "in vain" + " " * 9, "besides"
        )
        for row in rows(options.away_s, options.churn_s):
            if row.group in options.only:
                for name, side in sides.items():
                    if not (row.group == "speeds" and name == "torchft"):  # It has no shares.
                        table.print(row.what, name, *measure(row, side, options.repeat))


if __name__ == "__main__":
    main()
