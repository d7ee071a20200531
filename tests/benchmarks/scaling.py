"""Two workers on one core each against one worker on one core, both by mlx-train.

The same configuration and global batch, so both do the same steps with the same result; the runs take turns. A third
figure says what the machine itself gives: two runs of one worker at the same time, which share nothing but the hardware.
Without it a processor that slows down, or runs short of memory bandwidth, when a second core works would be taken for a
cost of ours. On Linux each worker is kept on its own core. On macOS that cannot be asked for, and one worker has one
core only as far as MLX on the CPU uses one.

    uv run python tests/benchmarks/scaling.py
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import (
    TrainRun,
    build_model,
    fresh,
    interleave,
    mlx_train,
    parser,
    print_machine,
    print_table,
    total_s,
    workplace,
    write_config,
    write_rows,
)

WARMUP_STEPS = 3
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


def quickstart(num_steps: int) -> dict[str, Any]:
    """The quick start, without evaluation and checkpoints."""
    import yaml

    config = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    del config["data"]["validation"], config["eval"]
    for source in config["data"]["train"]:
        source["path"] = str(QUICKSTART.parent / source["path"])
    config["train"]["max_steps"] = num_steps
    return {**config, "checkpoint": {"steps": None}}


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
        "train": {"global_batch_size": 16, "micro_batch_size": 4, "max_steps": num_steps},
        "checkpoint": {"steps": None},
    }


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    args.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="the cores to use, on Linux (default: 0 1)")
    options = args.parse_args()
    cores = tuple(options.cores) if hasattr(os, "sched_setaffinity") else ()
    rows = []
    with workplace(options.blas) as folder:
        configs = {
            "quick start": quickstart(150),
            "10 M, full": ten_million(folder, 15, "full"),
            "10 M, LoRA": ten_million(folder, 15, "lora"),
        }
        print_machine()
        for name, config in configs.items():
            sides = {
                "one": partial(train, config, folder / name / "one", 1, cores[:1]),
                "two": partial(train, config, folder / name / "two", 2, cores),
                "apart": partial(train_apart, config, folder / name / "apart", cores),
            }
            results = interleave(sides, options.rounds)
            one_s, two_s, apart_s = (total_s([run.step_s for run in runs]) for runs in results.values())
            comm_s = total_s([run.comm_s for run in results["two"]])
            num_tokens = results["one"][0].num_tokens
            rows.append(
                [name, *(f"{num_tokens / s:.0f}" for s in (one_s, two_s)), f"{one_s / two_s:.2f}", f"{2 * one_s / apart_s:.2f}", f"{comm_s / two_s:.0%}"]
            )
    header = ["model", "1 worker, label tokens/s", "2 workers", "ratio", "ratio of two runs apart", "waiting for the other"]
    print_table(header, rows)
    print("goal: a ratio of at least 1.85")


if __name__ == "__main__":
    main()
