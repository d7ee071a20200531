"""Two workers on one core each against one worker on one core, both by mlx-train.

The same configuration and global batch, so both do the same steps with the same result; the runs take turns. A third
figure says what the machine itself gives: the ratio for two runs of one worker at the same time, which share nothing
but the hardware. Without it a processor that slows down, or runs short of memory bandwidth, when a second core works
would be taken for a cost of ours. On Linux each worker is kept on a core of its own. On macOS that cannot be asked for,
and a worker has one core only as far as MLX on the CPU uses one.

    uv run python tests/benchmarks/scaling.py
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    Table,
    build_model,
    fresh,
    interleave,
    mlx_train,
    parser,
    print_machine,
    total_s,
    workplace,
    write_config,
    write_rows,
)

from mlx_distributed.config import load_config, to_dict

WARMUP_STEPS = 2
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def quickstart(num_steps: int) -> dict[str, Any]:
    """The quick start, without evaluation and checkpoints."""
    without = ["data.validation=[]", "eval.at_start=false", "eval.generate=false", "checkpoint.steps=null"]
    return to_dict(load_config(QUICKSTART, [*without, f"train.max_steps={num_steps}"]))


def ten_million(folder: Path, num_steps: int, method: str) -> dict[str, Any]:
    """10 M parameters, answers of about 30 to 300 tokens."""
    data = folder / "rows.json"
    if not data.exists():
        write_rows(data, num_rows=640, num_words=(15, 120))
        fresh(build_model, folder / "model", data, "10M")
    return {
        "model": {"path": str(folder / "model")},
        "method": method,
        "data": {"train": str(data)},
        "train": {"global_batch_size": 32, "micro_batch_size": 4, "max_steps": num_steps},
        "checkpoint": {"steps": None},
    }


class Times(NamedTuple):
    """Of the steps after the first ones."""

    step_s: list[float]
    comm_s: list[float]
    num_labels: float


def train(config: dict[str, Any], folder: Path, nproc: int, cores: tuple[int, ...]) -> Times:
    """One run of `mlx-train`."""
    file = write_config(folder, {**config, "parallel": {"nproc": nproc}})
    steps = mlx_train(file, cores).steps[WARMUP_STEPS:]
    num_labels = sum(step["train/num_tokens"] for step in steps)
    return Times([step["perf/step_s"] for step in steps], [step["perf/comm_s"] for step in steps], num_labels)


def train_apart(config: dict[str, Any], folder: Path, cores: tuple[int, ...]) -> Times:
    """Two runs of one worker at the same time; the times are the means of the two."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda i: train(config, folder / str(i), 1, cores[i : i + 1]), range(2)))
    step_s = [statistics.mean(times) for times in zip(*(run.step_s for run in runs), strict=True)]
    return runs[0]._replace(step_s=step_s)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    args.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="the cores to use, on Linux (default: 0 1)")
    options = args.parse_args()
    cores = tuple(options.cores) if hasattr(os, "sched_setaffinity") else ()
    with workplace(options.blas) as folder:
        configs = {
            "quick start": quickstart(150),
            "10 M, full": ten_million(folder, 8, "full"),
            "10 M, LoRA": ten_million(folder, 8, "lora"),
        }
        print_machine()
        unit = "label tokens/s"
        table = Table("model", f"1 worker, {unit}", f"2 workers, {unit}", "ratio", "two runs apart", "communication")
        for name, config in configs.items():
            sides = {
                "one": lambda place, config=config: train(config, place, 1, cores[:1]),
                "two": lambda place, config=config: train(config, place, 2, cores),
                "apart": lambda place, config=config: train_apart(config, place, cores),
            }
            results = interleave(sides, options.rounds, folder / name)
            one_s, two_s, apart_s = (total_s([run.step_s for run in runs]) for runs in results.values())
            comm_s = total_s([run.comm_s for run in results["two"]])
            num_labels = results["one"][0].num_labels
            rates = (f"{num_labels / seconds:.0f}" for seconds in (one_s, two_s))
            table.print(name, *rates, f"{one_s / two_s:.2f}", f"{2 * one_s / apart_s:.2f}", f"{comm_s / two_s:.0%}")
    print("\ngoal: a ratio of at least 1.85")


if __name__ == "__main__":
    main()
