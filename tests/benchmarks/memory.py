"""Memory of a worker of mlx-train against a bare MLX loop that does the same step.

Full and LoRA training of 10 M and 50 M parameters in micro-batches of 4 rows of 128 tokens, with one worker and with
two, each of which has 1, 2, 4 or 8 micro-batches per step. The bare loop takes the micro-batches of the first worker,
adds up their gradients one after the other, clips and updates with mlx.optimizers.AdamW. `MLX` is the peak of what MLX
has allocated, `above` the peak of the resident memory of the worker's process minus that: Python, its packages, the
transport's buffers and MLX's cache of freed memory.

    uv run python tests/benchmarks/memory.py
    uv run python tests/benchmarks/memory.py --models 10M --microbatches 1 8
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

MICRO_BATCH_SIZE = 4
NUM_TOKENS = 128
NUM_STEPS = 3


def bare_loop(config_file: Path, num_microbatches: int) -> int:
    """Peak of MLX's memory in bytes, of the steps alone. To be called through `fresh`."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    from mlx_distributed.cli.load import load_all
    from mlx_distributed.comm.base import LocalComm
    from mlx_distributed.config import load_config
    from mlx_distributed.data.batch import collate

    mx.disable_compile()  # as mlx-train does on the CPU
    loaded = load_all(load_config(config_file), LocalComm())
    model, optimizer = loaded.model, optim.AdamW(learning_rate=1e-4, bias_correction=True)

    def summed_loss(tokens: mx.array, loss_mask: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (losses * loss_mask[:, 1:]).sum()

    loss_and_gradients = nn.value_and_grad(model, summed_loss)
    mx.reset_peak_memory()
    for step in range(NUM_STEPS):
        total, num_labels = None, 0
        for rows in loaded.plan.microbatches(step)[:num_microbatches]:
            batch = collate([loaded.rows.train[row] for row in rows])
            loss, gradients = loss_and_gradients(mx.array(batch.tokens), mx.array(batch.loss_mask))
            total = gradients if total is None else tree_map(mx.add, total, gradients)
            del gradients
            mx.eval(loss, total)
            num_labels += batch.num_labels
        total, _ = optim.clip_grad_norm(tree_map(lambda g, n=num_labels: g / n, total), max_norm=1.0)
        optimizer.update(model, total)
        del total
        mx.eval(model.parameters(), optimizer.state)
    return mx.get_peak_memory()


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--models", nargs="+", choices=MODELS, default=["10M", "50M"], help="default: 10M 50M")
    args.add_argument("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"], help="default: both")
    args.add_argument("--microbatches", nargs="+", type=int, default=[1, 2, 4, 8], help="per worker (default: 1 2 4 8)")
    options = args.parse_args()
    with workplace(options.blas) as folder:
        data = write_rows(folder / "rows.json", num_rows=512, num_words=(NUM_TOKENS, NUM_TOKENS))
        for size in options.models:
            fresh(build_model, folder / size, data, size)
        print_machine()
        table = Table(
            "model", "method", "workers", "micro-batches each", "MLX, MB", "bare loop, MB", "ratio", "above, MB"
        )
        for size, method, num, nproc in itertools.product(
            options.models, options.methods, options.microbatches, (1, 2)
        ):
            batch_size = MICRO_BATCH_SIZE * num * nproc
            config: dict[str, Any] = {
                "model": {"path": str(folder / size)},
                "method": method,
                "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
                "train": {
                    "global_batch_size": batch_size,
                    "micro_batch_size": MICRO_BATCH_SIZE,
                    "max_steps": NUM_STEPS,
                },
                "parallel": {"nproc": nproc},
                "checkpoint": {"steps": None},
            }
            file = write_config(folder / f"{size}-{method}-{num}-{nproc}", config)
            run, bare = mlx_train(file), fresh(bare_loop, file, num)
            peak = run.steps[-1]["perf/peak_memory_bytes"]
            peak_mb, bare_mb, above_mb = (f"{value / 1e6:.0f}" for value in (peak, bare, run.peak_rss_bytes - peak))
            table.print(size, method, nproc, num, peak_mb, bare_mb, f"{peak / bare:.2f}", above_mb)
    print("\ngoal: a ratio of at most 1.15, and at most 300 MB above MLX's peak")


if __name__ == "__main__":
    main()
