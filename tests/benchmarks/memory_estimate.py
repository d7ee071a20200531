"""The memory that `mlx-distributed plan` foretells against the peak that a run of mlx-train has measured.

Full training, LoRA and QLoRA (4 bits), with and without gradient checkpointing and in each precision, of models of
0.7 M to 50 M parameters, in micro-batches of 4 rows of 128 tokens. Each run is in a process of its own, and the peak
is that of `mx.get_peak_memory` after the last step (`perf/peak_memory_bytes`): all that MLX has allocated since it was
loaded, without its cache of freed memory and without Python.

    uv run python tests/benchmarks/memory_estimate.py
    uv run python tests/benchmarks/memory_estimate.py --models 10M --precisions fp32 --microbatches 1
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from common import (
    MODELS,
    Table,
    build_model,
    fresh,
    mlx_train,
    parser,
    print_machine,
    workplace,
    write_config,
    write_rows,
)

MICRO_BATCH_SIZE, NUM_TOKENS, NUM_STEPS = 4, 128, 2
METHODS = ("full", "lora", "qlora")


def foretell(config_file: Path) -> int:
    """Bytes, as `mlx-distributed plan` has them. To be called through `fresh`."""
    from mlx_distributed.cli.plan.estimate import UNLIMITED, Planner, Workers
    from mlx_distributed.cli.plan.inputs import read_run
    from mlx_distributed.config import load_config

    config = load_config(config_file)
    make, _ = read_run(config)
    model, load = make(config)
    planner = Planner(model, Workers((1.0,), (UNLIMITED,), 1.0, 1.0), load)
    return planner.plan(config.parallel.pipeline).workers[0].total_bytes


def main() -> None:
    args = parser(__doc__)
    models = ["0.7M", "10M", "50M"]
    args.add_argument("--models", nargs="+", choices=MODELS, default=models, help="default: 0.7M 10M 50M")
    args.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    args.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    args.add_argument("--microbatches", nargs="+", type=int, default=[1, 4], help="per step (default: 1 4)")
    options = args.parse_args()
    with workplace(options.blas) as folder:
        data = write_rows(folder / "rows.json", num_rows=64, num_words=(NUM_TOKENS, NUM_TOKENS))
        for size in options.models:
            fresh(build_model, folder / size, data, size)
        print_machine()
        table = Table(
            "model", "method", "precision", "checkpointing", "micro-batches", "foretold, MB", "peak, MB", "off by"
        )
        worst = 0.0
        for case in itertools.product(
            options.models, options.methods, options.precisions, (False, True), options.microbatches
        ):
            size, method, precision, checkpointing, num = case
            model: dict[str, Any] = {"path": str(folder / size)}
            config: dict[str, Any] = {
                "model": model | ({"quantize": {"bits": 4}} if method == "qlora" else {}),
                "method": "full" if method == "full" else "lora",
                "precision": precision,
                "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
                "train": {
                    "global_batch_size": MICRO_BATCH_SIZE * num,
                    "micro_batch_size": MICRO_BATCH_SIZE,
                    "max_steps": NUM_STEPS,
                    "gradient_checkpointing": checkpointing,
                },
                "checkpoint": {"steps": None},
            }
            file = write_config(folder / "-".join(map(str, case)), config)
            foretold, peak = fresh(foretell, file), mlx_train(file).steps[-1]["perf/peak_memory_bytes"]
            off = foretold / peak - 1
            worst = max(worst, abs(off))
            wanted = "yes" if checkpointing else "no"
            table.print(
                size, method, precision, wanted, num, f"{foretold / 1e6:.1f}", f"{peak / 1e6:.1f}", f"{off:+.1%}"
            )
    print(f"\nworst: {worst:.1%}; goal: at most 10 %")


if __name__ == "__main__":
    main()
