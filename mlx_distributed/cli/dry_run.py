"""`mlx-train --dry-run`: everything that can be refused is, and nothing is written."""

from __future__ import annotations

from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.parts import load_whole, make_plan
from mlx_distributed.cli.plan.settle import settle
from mlx_distributed.comm.base import LocalComm
from mlx_distributed.config import Config
from mlx_distributed.data.plan import Plan
from mlx_distributed.parallel.data import rank_weights, share


def dry_run(config: Config) -> int:
    """Load data and model as a run would, and print what it would do; returns the exit status."""
    loaded = load_all(config, LocalComm())
    plan = loaded.plan
    # Of the first rows, where they are streamed: to ask that plan would have rows tokenised into the cache.
    num_microbatches = make_plan(config, loaded.rows).num_microbatches
    num_stages = config.parallel.pipeline.num_stages
    num_copies = config.parallel.size // num_stages
    ranges = share(num_microbatches, rank_weights(config.parallel.share, num_copies))
    for line in loaded.rows.report.lines():
        print(line)
    per_epoch = f", {plan.steps_per_epoch} steps per epoch" if isinstance(plan, Plan) else ""
    print(f"{plan.num_steps} steps of {plan.global_batch_size} rows{per_epoch}")
    for copy, (start, stop) in enumerate(ranges):
        workers = (
            f"worker {copy}" if num_stages == 1 else f"workers {copy * num_stages} to {(copy + 1) * num_stages - 1}"
        )
        print(f"{workers}: {stop - start} of the {num_microbatches} micro-batches of a step")
    if num_stages > 1:
        rows = None if config.data.streaming else loaded.rows
        settled = settle(load_whole(config, loaded.tokenizer), config, rows, LocalComm())
        print(f"layers of each stage: {', '.join(map(str, settled.settings.split))}")
        print(settled.reason)
    print("the configuration and the data are fine; run again without --dry-run to train")
    return 0
