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


def quickstart(folder: Path, num_steps: int) -> dict[str, Any]:
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
    cores = options.cores if hasattr(os, "sched_setaffinity") else ()

    rows = []
    with workplace(options.blas) as folder:
        configs = {
            "quick start": quickstart(folder, 150),
            "10 M, full": ten_million(folder, 12, "full"),
            "10 M, LoRA": ten_million(folder, 12, "lora"),
        }
        print_machine()
        for name, config in configs.items():

            def run(side: str, nproc: int, cores: tuple[int, ...], config: dict[str, Any] = config) -> TrainRun:
                file = write_config(folder / side, {**config, "parallel": {"nproc": nproc}})
                return mlx_train(file, cores)

            def two_runs(number: int) -> TrainRun:
                pass

    print_table(["model", "tokens/step", "1 worker, s/step", "2 workers, s/step", "ratio", "comm", "ceiling"], rows)
