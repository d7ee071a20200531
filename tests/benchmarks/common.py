"""What the benchmarks share: models and rows to train on, timed runs of `mlx-train`, and tables.

A benchmark imports no MLX itself: everything that uses it runs in a fresh process. So the settings below are in force
before MLX is loaded, nothing is left over from one run to the next, and the peak memory that the system reports for a
worker is not that of the benchmark (Linux hands the peak of a parent down to its children).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mlx_distributed.cli.local import worker_environment

P = ParamSpec("P")
T = TypeVar("T")

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SHAPES = {
    "0.1M": (64, 192, 2, 2, 512),
    "0.7M": (128, 384, 2, 2, 2048),
    "10M": (256, 1024, 8, 4, 8192),
    "50M": (512, 2048, 12, 8, 8192),
}
MODELS: dict[str, dict[str, Any]] = {name: dict(zip(_KEYS, shape, strict=True)) for name, shape in _SHAPES.items()}
"""Qwen3 architectures by their number of parameters."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark; the help is the docstring of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blas",
        choices=("auto", "wheel"),
        default="auto",
        help="Linux: preload OpenBLAS where it is installed (auto), or use what comes with MLX (wheel)",
    )
    return parser


@contextmanager
def workplace(blas: str) -> Iterator[Path]:
    """A temporary folder, and the settings of `mlx-train`'s workers for every process started from here on."""
    if blas == "wheel":
        os.environ["LD_PRELOAD"] = ""
    environment, hint = worker_environment(os.environ, sys.platform)
    os.environ.update(environment, HF_HUB_OFFLINE="1")
    print(hint or "", end="\n" if hint else "")
    with tempfile.TemporaryDirectory(prefix="mlx-distributed-benchmark-") as folder:
        yield Path(folder)


def print_machine() -> None:
    """Versions, processor, BLAS and load: what figures must be read with."""
    packages = ("mlx", "mlx-lm", "mlx-distributed", "grpcio")
    print(", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]))
    blas = "Accelerate" if sys.platform == "darwin" else os.environ.get("LD_PRELOAD") or "of the MLX wheel"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.platform()}, {_processor()}, {os.cpu_count()} cores, load {load}; BLAS {blas}, 1 thread\n")


def _processor() -> str:
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def fresh(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a new process and return what it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def run_group(work: Callable[..., T], num_ranks: int, *args: Any, patience_s: float = 600.0) -> list[T]:
    """Call `work(comm, *args)` on every rank of a group over gRPC, each in a new process; returns what they return.

    Raises:
        SystemExit: a rank has failed, or all are silent for longer than `patience_s`.
    """
    context = get_context("spawn")
    told: Queue[tuple[int, Any]] = context.Queue()
    lines: list[Queue[list[str]]] = [context.Queue() for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_be_rank, args=(rank, work, args, lines, told), daemon=True) for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        addresses = _hear_all(told, ranks, patience_s)
        for line in lines:
            line.put(addresses)
        return _hear_all(told, ranks, patience_s)
    finally:
        for process in ranks:
            process.join(timeout=10.0)
            process.kill()


def _be_rank(
    rank: int, work: Callable[..., T], args: tuple[Any, ...], lines: list[Queue[list[str]]], told: Queue[tuple[int, T]]
) -> None:
    from mlx_distributed.comm.grpc_comm import GrpcComm

    comm = GrpcComm(rank, len(lines), "benchmark")
    told.put((rank, comm.address))
    comm.connect(lines[rank].get())
    result = work(comm, *args)
    comm.close()
    told.put((rank, result))


def _hear_all(told: Queue[tuple[int, Any]], ranks: Sequence[BaseProcess], patience_s: float) -> list[Any]:
    """One word of every rank, in rank order."""
    said: dict[int, Any] = {}
    limit_s = time.monotonic() + patience_s
    while len(said) < len(ranks):
        try:
            rank, word = told.get(timeout=1.0)
            said[rank] = word
        except queue.Empty:
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
            if failed or time.monotonic() > limit_s:
                raise SystemExit(f"rank {failed[0]} has failed" if failed else "the ranks are silent") from None
    return [said[rank] for rank in range(len(ranks))]


def write_rows(file: Path, num_rows: int, num_words: tuple[int, int], seed: int = 0) -> Path:
    """Alpaca rows of made-up words, whose answers have `num_words` (from, to) of them."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ol", "um")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(20000)]
    rows = [
        {
            "instruction": " ".join(rng.choices(words, k=8)),
            "output": " ".join(rng.choices(words, k=rng.randint(*num_words))),
        }
        for _ in range(num_rows)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def build_model(folder: Path, data: Path, size: str, model_type: str = "qwen3") -> Path:
    """Write a model with random weights and a tokenizer trained on `data`. To be called through `fresh`."""
    from mlx_distributed.config.schema import DataConfig, LoraConfig, ModelConfig, SourceConfig
    from mlx_distributed.data.sources import read_corpus
    from mlx_distributed.models import build_scratch, save_final, train_tokenizer, wrap_tokenizer

    rows = read_corpus(DataConfig(train=(SourceConfig(path=str(data)),)), seed=0).train
    texts = (message.content for row in rows for message in row.messages)
    tokenizer = wrap_tokenizer(train_tokenizer(texts, MODELS[size]["vocab_size"]), model_type)
    model, config = build_scratch({"model_type": model_type, **MODELS[size]}, tokenizer, seed=0)
    save_final(folder, model, tokenizer, config, source=ModelConfig(), method="full", lora=LoraConfig())
    return folder


@dataclass(frozen=True)
class TrainRun:
    """What a run of `mlx-train` measured."""

    steps: list[dict[str, float]]
    """Lines of metrics.jsonl, one per step, in order."""
    peak_rss_bytes: int
    """Of the largest worker."""


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """A configuration file in a folder of its own; its run is to be written there too."""
    folder.mkdir(parents=True)
    file = folder / "config.yaml"
    file.write_text(json.dumps({**config, "output_dir": "run"}), encoding="utf-8")  # JSON is YAML
    return file


def mlx_train(config_file: Path, cores: Sequence[int] = ()) -> TrainRun:
    """Run `mlx-train` to the end.

    Args:
        config_file: from `write_config`.
        cores: worker r is kept on the r-th of these (Linux only); empty leaves that to the system.
    """
    command = [str(Path(sys.executable).with_name("mlx-train")), "--config", str(config_file)]
    with (config_file.parent / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        pid = 0
        while not pid:
            time.sleep(0.1)
            _pin(process.pid, cores)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)  # its peak is the largest of its children too
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{output.read()}")
    lines = (config_file.parent / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "perf/step_s" in line]
    return TrainRun(steps, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _pin(parent: int, cores: Sequence[int]) -> None:
    """Keep every thread of each child of a process on the child's core; again and again, as threads are started."""
    if not cores:
        return
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="utf-8").split()
        for child, core in zip(children, cores, strict=False):
            for thread in Path(f"/proc/{child}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {core})
    except (FileNotFoundError, ProcessLookupError):
        return  # it has just ended


def interleave(sides: Mapping[str, Callable[[Path], T]], num_rounds: int, folder: Path) -> dict[str, list[T]]:
    """Call every side once per round, one after the other, so that a busy machine is busy for all of them.

    A side is given the name of a folder of its own for each call, which does not exist yet.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(num_rounds):
        for name, side in sides.items():
            results[name].append(side(folder / f"{name}-{number}"))
    return results


def total_s(runs: Sequence[Sequence[float]]) -> float:
    """Seconds of all steps, each step's being the median of the runs, which did the same steps."""
    return sum(statistics.median(times) for times in zip(*runs, strict=True))


class Table:
    """A Markdown table, printed row by row as the figures come."""

    def __init__(self, *header: str) -> None:
        self._widths = [max(len(name), 10) for name in header]
        self.print(*header)
        self.print(*("-" * width for width in self._widths))

    def print(self, *cells: object) -> None:
        texts = [str(cell).ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        print("| " + " | ".join(texts) + " |", flush=True)
