"""Allreduce and training over real networks in small: a network namespace per rank, and links of a given rate.

The namespaces are joined by veth pairs and a bridge, in one more namespace. Token buckets (`tc tbf`) shape each link in
both directions. Nothing adds delay, and packets are lost only where a queue of 20 ms overflows. The transports take
turns, and a figure is the median of the turns, each as slow as its slowest rank. MLX's ring is given one fp32 array and
Gloo, where torch can be imported, one tensor; ours goes in buckets as in training.

`line` is the time that the fewest bytes of an allreduce take at the rate of the link, divided by what was measured: at
most 0.956, as packets have headers. `exposed` is what a step waited for, on the rank that waited least, as the other
one waits for the computation of its peer too; `alone` is an allreduce of the same arrays without a step. The columns
of `overlap` are those of `overlap.py`.

Needs Linux, root, iproute2 and util-linux, and leaves nothing behind.

    sudo .venv/bin/python tests/benchmarks/networks.py
    sudo .venv/bin/python tests/benchmarks/networks.py --modes unequal train --wires fp32 int8
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from common import Table, build_model, fresh, interleave, parser, print_machine, workplace, write_config, write_rows
from overlap import GOALS, RATIOS, Rows

from mlx_distributed.cli.control import Control
from mlx_distributed.comm.compress import CODECS

LINKS = ((10000, 2), (2500, 2), (1000, 2), (1000, 4), (100, 2))
"""Mbit/s, and ranks."""
SIZES_MB = (1, 16, 100)
UNEQUAL_MBIT, UNEQUAL_MB, UNEQUAL_ROUNDS = (1000, 1000, 200), 16, 5
TRAIN_ROWS = {1000: 2, 100: 16}
"""Rows per step and rank by the rate of the links: to compute them takes about as long as to send 10 M gradients."""
NUM_TOKENS = 128
NUM_STEPS, WARMUP_STEPS = 4, 1

OVERLAP_MBIT, OVERLAP_ROUNDS = 1000, 5

LOOSE_MBIT, LOOSE_ROUNDS = 100, 2
LOOSE = {
    "step, fp32": ["train.max_steps=8"],
    "step, int8": ["train.max_steps=8", "parallel.wire=int8"],
    "delayed, int8": ["train.max_steps=8", "parallel.sync=delayed", "parallel.wire=int8"],
    "diloco, int8": ["train.max_steps=64", "parallel.sync=diloco", "parallel.wire=int8"],
}
"""What is set in each run; 64 steps are two exchanges, and the one at the end."""
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"

QUEUE_MS = 20
ROUNDS_S, MIN_ROUNDS, MAX_ROUNDS = 15.0, 2, 9
"""How long all rounds of an allreduce are to take, and how many there are at least and at most."""
LIMIT_S = 600.0
"""A rank that does not answer for so long ends the benchmark."""

OTHERS = ("ring", *(["gloo"] if find_spec("torch") else []))

Figures = Mapping[str, float]
Sides = Mapping[str, tuple[str, str]]
"""By name, a transport and a wire format."""


def optimum_s(num_bytes: int, rates_mbit: Sequence[float]) -> float:
    """The least time of an allreduce in which every rank owns a slice of the buffer, slices as large as is best.

    Of a buffer of S bytes a rank that owns the share s of it sends, and receives, S * (1 + (n - 2) * s) bytes: the
    slices of the others, and its own, finished, to each of them. So in time T the rank with a link of rate b can own
    (T * b / S - 1) / (n - 2), which must not be negative, and together they must own 1.
    """
    return num_bytes * 8e-6 * max(2 * (len(rates_mbit) - 1) / sum(rates_mbit), 1 / min(rates_mbit))


def equal_slices_s(num_bytes: int, rates_mbit: Sequence[float]) -> float:
    """The same where every rank owns as much: what the slowest link takes."""
    return num_bytes * 8e-6 * 2 * (len(rates_mbit) - 1) / len(rates_mbit) / min(rates_mbit)


def check_machine() -> None:
    """End with the reason where this machine cannot do it."""
    if sys.platform != "linux" or os.geteuid():
        raise SystemExit("skipped: network namespaces need Linux and root")
    for tool, package in {"ip": "iproute2", "tc": "iproute2", "taskset": "util-linux"}.items():
        if shutil.which(tool) is None:
            raise SystemExit(f"skipped: {tool} is not installed (package {package})")


def run(command: str) -> None:
    """A command that makes the network; what it does not like is why there is no benchmark."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"skipped: {command}: {' '.join(done.stderr.split())}")


@contextmanager
def network(rates_mbit: Sequence[int]) -> Iterator[list[str]]:
    """Namespaces by rank, each with a link of its rate as eth0 with the address 10.0.0.(rank + 1)."""
    switch, *names = [f"mlx-distributed-{os.getpid()}-{end}" for end in ("switch", *range(len(rates_mbit)))]
    try:
        run(f"ip netns add {switch}")
        run(f"ip -n {switch} link add bridge type bridge")
        run(f"ip -n {switch} link set bridge up")
        for rank, (name, rate_mbit) in enumerate(zip(names, rates_mbit, strict=True)):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link add eth0 type veth peer name port{rank} netns {switch}")
            run(f"ip -n {switch} link set port{rank} master bridge up")
            run(f"ip -n {name} addr add 10.0.0.{rank + 1}/24 dev eth0")
            run(f"ip -n {name} link set lo up")
            run(f"ip -n {name} link set eth0 up")
            # As on macOS, whatever the default of this machine.
            run(f"ip -n {name} route change 10.0.0.0/24 dev eth0 congctl cubic")
            # Bytes of 0.8 ms, above 1 Gbit/s of less: smaller ones leave a line idle, larger ones come free of charge.
            burst = max(min(rate_mbit * 100, 100_000), rate_mbit * 31)
            for namespace, device in ((name, "eth0"), (switch, f"port{rank}")):
                shape = f"tbf rate {rate_mbit}mbit burst {burst} latency {QUEUE_MS}ms"
                run(f"tc -n {namespace} qdisc add dev {device} root {shape}")
        yield names
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


class Ranks:
    """Processes of `network_rank.py` that do the same at the same time."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[Control] = []

    def start(self, namespace: str, rates_mbit: Sequence[int], core: int | None) -> None:
        """Start the next one; all its threads stay on `core`, if there is one."""
        ours, theirs = socket.socketpair()
        with theirs:
            pinned = [] if core is None else ["taskset", "-c", str(core)]
            program = [sys.executable, str(Path(__file__).with_name("network_rank.py"))]
            numbers = map(str, (theirs.fileno(), len(self._processes), *rates_mbit))
            command = ["ip", "netns", "exec", namespace, *pinned, *program, *numbers]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
            # In a session of its own, so that Ctrl-C reaches this process alone.
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, start_new_session=True)
            self._processes.append(process)
        self._controls.append(Control(ours))

    def ask(self, **message: Any) -> list[dict[str, Any]]:
        """Have all do something, and return their answers."""
        for control in self._controls:
            control.send(**message)
        answers = [control.receive() if control.heard(LIMIT_S) else None for control in self._controls]
        if None in answers:
            raise SystemExit(f"rank {answers.index(None)} has ended, or not answered for {LIMIT_S:.0f} s: {message}")
        return [answer for answer in answers if answer is not None]

    def all_reduce(self, sides: Sides, num_mb: float, num_rounds: int, folder: Path) -> dict[str, Figures]:
        """Medians, over some rounds of turns, of what the slowest rank took and of what the busiest one sent."""

        def turn(side: str, wire: str, _: Path) -> Figures:
            answers = self.ask(what="all_reduce", side=side, wire=wire, num_elements=int(num_mb * 250_000))
            return {key: max(answer[key] for answer in answers) for key in answers[0]}

        turns = interleave({name: partial(turn, *side) for name, side in sides.items()}, num_rounds, folder)
        return {name: medians(of_name) for name, of_name in turns.items()}

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for control in self._controls:
            control.close()


@contextmanager
def ranks_over(rates_mbit: Sequence[int], pinned: bool = False) -> Iterator[Ranks]:
    """A rank in every namespace of a network, with `pinned` rank r on core r."""
    with network(rates_mbit) as namespaces, closing(Ranks()) as ranks:
        for rank, namespace in enumerate(namespaces):
            ranks.start(namespace, rates_mbit, rank if pinned else None)
        yield ranks


def medians(figures: Sequence[Figures]) -> Figures:
    """Of every figure."""
    return {key: statistics.median(each[key] for each in figures) for key in figures[0]}


def sides_of(wires: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Ours in every wire format, and the others."""
    return {wire: ("grpc", wire) for wire in wires} | {name: (name, "fp32") for name in OTHERS}


def equal(folder: Path, wires: Sequence[str], links: Sequence[int], sizes_mb: Sequence[int]) -> None:
    """Allreduces over links that are alike."""
    table = Table("link, Mbit/s", "ranks", "size, MB", "wire", "ours, s", "MB sent", "line", "ring/ours", "Gloo/ours")
    for rate_mbit, num_ranks in LINKS:
        if rate_mbit not in links:
            continue
        with ranks_over([rate_mbit] * num_ranks) as ranks:
            ranks.all_reduce(sides_of(wires), 0.001, 1, folder)  # joins the groups
            for size_mb in sizes_mb:
                best_s = {
                    name: equal_slices_s(CODECS[wire].num_bytes(size_mb * 250_000), [rate_mbit] * num_ranks)
                    for name, (_, wire) in sides_of(wires).items()
                }
                num_rounds = min(max(int(ROUNDS_S / sum(best_s.values())), MIN_ROUNDS), MAX_ROUNDS)
                results = ranks.all_reduce(sides_of(wires), size_mb, num_rounds, folder)
                for wire in wires:
                    seconds, sent_mb = results[wire]["seconds"], results[wire]["sent_bytes"] / 1e6
                    ratios = [f"{results[name]['seconds'] / seconds:.2f}" for name in OTHERS] + ["-"]
                    figures = (f"{seconds:.4f}", f"{sent_mb:.1f}", f"{best_s[wire] / seconds:.2f}", *ratios[:2])
                    table.print(rate_mbit, num_ranks, size_mb, wire, *figures)


def unequal(folder: Path, wires: Sequence[str]) -> None:
    """Allreduces where one link is slower than the others, with equal slices, with slices by the rates, and by what an
    elastic run measures of them."""
    sides = sides_of(wires) | {f"{wire}, by rate": ("owned", wire) for wire in wires}
    sides |= {f"{wire}, measured": ("measured", wire) for wire in wires}
    print(f"{UNEQUAL_MB} MB over links of {'/'.join(map(str, UNEQUAL_MBIT))} Mbit/s")
    table = Table("slices         ", "optimum, s", "equal slices, s", "measured, s", "of optimum", "most MB sent")
    with ranks_over(UNEQUAL_MBIT) as ranks:
        answers = ranks.ask(what="probe")
        found = "/".join(f"{answer['mbit_per_s']:.0f}" for answer in answers)
        print(f"measured as {found} Mbit/s in {answers[0]['seconds']:.2f} s")
        ranks.all_reduce(sides, 0.001, 1, folder)
        results = ranks.all_reduce(sides, UNEQUAL_MB, UNEQUAL_ROUNDS, folder)
    for name, (_, wire) in sides.items():
        num_bytes, seconds = CODECS[wire].num_bytes(UNEQUAL_MB * 250_000), results[name]["seconds"]
        best_s = optimum_s(num_bytes, UNEQUAL_MBIT)
        times = (f"{value:.3f}" for value in (best_s, equal_slices_s(num_bytes, UNEQUAL_MBIT), seconds))
        table.print(name, *times, f"{seconds / best_s:.2f}", f"{results[name]['sent_bytes'] / 1e6:.1f}")


def train(folder: Path, wires: Sequence[str]) -> None:
    """Steps of a full fine-tune of 10 M parameters on two ranks, each on a core of its own."""
    data = write_rows(folder / "rows.json", num_rows=512, num_words=(NUM_TOKENS, NUM_TOKENS))
    model = fresh(build_model, folder / "model", data, "10M")
    times = {"step, s": "step_s", "communication, s": "comm_s", "exposed, s": "exposed_s", "alone, s": "alone_s"}
    table = Table("link, Mbit/s", "transport", *times, "exposed / alone", "MB per step", "line in use")
    for rate_mbit, num_rows in TRAIN_ROWS.items():
        config = {
            "model": {"path": str(model)},
            "method": "full",
            "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
            "train": {"global_batch_size": 2 * num_rows, "micro_batch_size": num_rows, "max_steps": NUM_STEPS},
        }
        file = write_config(folder / f"train-{rate_mbit}", config)
        with ranks_over([rate_mbit] * 2, pinned=True) as ranks:
            answers = ranks.ask(what="train", config_file=str(file), wires=wires)
        for name in answers[0]:
            steps = [
                {key: (min if key == "exposed_s" else max)(rank[key] for rank in of_ranks) for key in of_ranks[0]}
                for of_ranks in zip(*(answer[name] for answer in answers), strict=True)
            ]
            figures = medians(steps[WARMUP_STEPS:])
            share = f"{figures['exposed_s'] / figures['alone_s']:.0%}"
            line = f"{figures['sent_bytes'] * 8e-6 / rate_mbit / figures['step_s']:.0%}"
            seconds = (f"{figures[key]:.3f}" for key in times.values())
            table.print(rate_mbit, name, *seconds, share, f"{figures['sent_bytes'] / 1e6:.1f}", line)


def loose(folder: Path) -> None:
    """Whole runs on two ranks, a core each, that agree in every step, one step late, or now and then."""
    data = write_rows(folder / "rows.json", num_rows=512, num_words=(NUM_TOKENS, NUM_TOKENS))
    config = {
        "model": {"path": str(fresh(build_model, folder / "model", data, "10M"))},
        "method": "full",
        "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
        "parallel": {"nproc": 2},
    }
    files = {"quick start": QUICKSTART, "10 M parameters": write_config(folder / "loose", config)}
    table = Table("link, Mbit/s", "what", "sync", "tokens/s", "against fp32", "KB per step", "times fewer")
    for what, file in files.items():
        rounds: dict[str, list[Figures]] = {name: [] for name in LOOSE}
        for _ in range(LOOSE_ROUNDS):
            for name, settings in LOOSE.items():
                with ranks_over([LOOSE_MBIT] * 2, pinned=True) as ranks:
                    answers = ranks.ask(what="run", config_file=str(file), settings=settings)
                rounds[name].append({key: min(answer[key] for answer in answers) for key in answers[0]})
        first, *_ = figures = {name: medians(found) for name, found in rounds.items()}
        for name, median in figures.items():
            faster, fewer = (median[key] / figures[first][key] for key in ("tokens_per_s", "bytes_per_step"))
            sent = f"{median['bytes_per_step'] / 1e3:.1f}", f"{1 / fewer:.1f}"
            table.print(LOOSE_MBIT, what, name, f"{median['tokens_per_s']:.0f}", f"{faster:.2f}", *sent)


def overlap() -> None:
    """Steps whose gradients are computed as they are sent."""
    rows = Rows("link, Mbit/s")
    with ranks_over([OVERLAP_MBIT] * 2) as ranks:
        for ratio in RATIOS:
            rows.print(OVERLAP_MBIT, ranks=ranks.ask(what="overlap", ratio=ratio, num_rounds=OVERLAP_ROUNDS))
    print(GOALS)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: clean up, and let nothing interrupt that, nor the commands that do it."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit("interrupted")


def main() -> None:
    args = parser(__doc__)
    modes, rates = ("equal", "unequal", "train", "loose", "overlap"), sorted({rate for rate, _ in LINKS})
    args.add_argument("--modes", nargs="+", choices=modes, default=modes, help="default: all")
    args.add_argument("--wires", nargs="+", choices=CODECS, default=list(CODECS), help="default: all")
    args.add_argument("--links", nargs="+", type=int, choices=rates, default=rates, help="Mbit/s (default: all)")
    args.add_argument("--sizes", nargs="+", type=int, default=SIZES_MB, help="MB (default: 1 16 100)")
    options = args.parse_args()
    check_machine()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with workplace(options.blas) as folder:
        print_machine()
        if "equal" in options.modes:
            equal(folder, options.wires, options.links, options.sizes)
            print("goals at 16 MB, 1000 and 2500 Mbit/s, ring/ours: fp32 1.0, bf16 2.0, int8 3.5, int4 5")
            print("goals at 100 MB, 1000 Mbit/s, 2 ranks, fp32: line 0.85, Gloo/ours 0.9\n")
        if "unequal" in options.modes:
            unequal(folder, options.wires)
            print("goal: 1.10 of the optimum\n")
        if "train" in options.modes:
            train(folder, options.wires)
            print("goal at 1000 Mbit/s: 25 % exposed\n")
        if "loose" in options.modes:
            loose(folder)
            print("goals, diloco: 5 times the tokens/s of step in fp32, 100 times fewer bytes\n")
        if "overlap" in options.modes:
            overlap()


if __name__ == "__main__":
    main()
