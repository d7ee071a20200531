"""Label tokens per second of mlx-train against the training loop of mlx_lm.lora, on an Alpaca file.

Both sides train the same new model (its tokenizer trained on the file) with the same LoRA layers, rank 8 on all linear
layers, on the same rows, 8 at a time, prompts masked, for one epoch in a process of their own. mlx_lm.lora's loop is
run as it is by default, its step compiled, and with MLX_DISABLE_COMPILE=1; the faster of the two counts. A label token
is a token of an answer or its stop token; the padding that mlx_lm.lora trains on is none. Time is that of the steps
alone: loading, tokenising, composing batches (on their side) and the first steps are left out.

    uv run python tests/benchmarks/throughput.py --data alpaca.json
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import (
    MODELS,
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
)

BATCH_SIZE = 8
WARMUP_STEPS = 4


class Step(NamedTuple):
    """One step of training on one batch."""

    num_labels: int
    num_tokens: int
    """Of its rows, prompts included."""
    num_positions: int
    """The same with padding."""
    step_s: float


def peer(config_file: Path, compiled: bool) -> list[Step]:
    """An epoch of mlx_lm.lora's own loop, in its own order of batches. To be called through `fresh`."""
    if not compiled:
        os.environ["MLX_DISABLE_COMPILE"] = "1"
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

    from mlx_distributed.config import load_config
    from mlx_distributed.data.messages import to_dicts
    from mlx_distributed.data.sources import read_corpus
    from mlx_distributed.models import load, prepare

    config = load_config(config_file)
    model, tokenizer, _ = load(config.model)
    prepare(model, config.method, config.lora, config.seed)  # with mlx-lm's own LoRA layers
    rows = [{"messages": to_dicts(row.messages)} for row in read_corpus(config.data, config.seed).train]
    steps: list[Step] = []

    def timed_batches(**kwargs: Any) -> Any:
        for tokens, spans in iterate_batches(**kwargs):
            start_s = time.perf_counter()
            yield tokens, spans
            step_s = time.perf_counter() - start_s
            num_labels = num_tokens = 0
            for row, (start, stop) in zip(np.array(tokens), np.array(spans), strict=True):
                # What follows the stop token is white space of the chat template.
                num_labels += int(np.flatnonzero(row[:stop] == tokenizer.eos_token_id)[-1]) + 1 - int(start)
                num_tokens += int(stop)
            steps.append(Step(num_labels, num_tokens, tokens.size, step_s))

    arguments = TrainingArgs(
        batch_size=BATCH_SIZE,
        iters=len(rows) // BATCH_SIZE + 1,  # the last one is not timed: nothing is asked for after it
        steps_per_save=len(rows),
        max_seq_length=config.data.max_seq_length,
        adapter_file=str(config_file.parent / "adapters.safetensors"),
    )
    np.random.seed(config.seed)  # the order of its batches
    dataset = CacheDataset(ChatDataset(rows, tokenizer, mask_prompt=True))
    optimizer = optim.AdamW(learning_rate=config.optimizer.learning_rate)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress display
        train(model, optimizer, dataset, args=arguments, iterate_batches=timed_batches)
    return steps


def ours(config_file: Path, steps_s: list[float]) -> list[Step]:
    """The batches that `mlx-train` took, given the times of its steps. To be called through `fresh`."""
    from mlx_distributed.cli.load import make_plan
    from mlx_distributed.config import load_config
    from mlx_distributed.data.sources import read_corpus
    from mlx_distributed.data.tokenize import collate, tokenize_corpus
    from mlx_distributed.models import load

    config = load_config(config_file)
    _, tokenizer, _ = load(config.model)
    rows = tokenize_corpus(read_corpus(config.data, config.seed), tokenizer, config.data)
    plan = make_plan(config, rows)
    steps = []
    for number, step_s in enumerate(steps_s):
        microbatches = [[rows.train[row] for row in rows_of] for rows_of in plan.microbatches(number)]
        taken = [row for microbatch in microbatches for row in microbatch]
        num_labels, num_tokens = sum(int(row.loss_mask.sum()) for row in taken), sum(len(row.tokens) for row in taken)
        steps.append(Step(num_labels, num_tokens, sum(collate(rows)[0].size for rows in microbatches), step_s))
    return steps


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="Alpaca file, for example alpaca_en_demo.json")
    args.add_argument("--model", choices=MODELS, default="0.7M", help="number of parameters (default: 0.7M)")
    args.add_argument("--micro-batch-size", type=int, default=BATCH_SIZE, help="ours; theirs is 8 (default: 8)")
    args.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    options = args.parse_args()

    with workplace(options.blas) as folder:
        model = fresh(build_model, folder / "model", options.data.resolve(), options.model)
        config = {
            "model": {"path": str(model)},
            "data": {"train": str(options.data.resolve())},
            "train": {"global_batch_size": BATCH_SIZE, "micro_batch_size": options.micro_batch_size},
            "checkpoint": {"steps": None},
        }

        def run_ours(place: Path) -> list[Step]:
            file = write_config(place, config)
            return fresh(ours, file, [line["perf/step_s"] for line in mlx_train(file).steps])

        def run_peer(place: Path, compiled: bool) -> list[Step]:
            return fresh(peer, write_config(place, config), compiled)

        run_peer(folder / "warm-up", compiled=True)  # fills the cache of compiled kernels
        print_machine()
        sides: dict[str, Callable[[Path], list[Step]]] = {
            "mlx-train": run_ours,
            "mlx_lm.lora": partial(run_peer, compiled=True),
            "mlx_lm.lora, MLX_DISABLE_COMPILE=1": partial(run_peer, compiled=False),
        }
        results = interleave(sides, options.rounds, folder)

    rates = []
    table = Table("loop".ljust(34), "label tokens/s", "padding", "steps", "label tokens", "s")
    for name, runs in results.items():
        steps = runs[0][WARMUP_STEPS:]
        seconds = total_s([[step.step_s for step in run[WARMUP_STEPS:]] for run in runs])
        num_labels = sum(step.num_labels for step in steps)
        padding = 1 - sum(step.num_tokens for step in steps) / sum(step.num_positions for step in steps)
        rates.append(num_labels / seconds)
        table.print(name, f"{rates[-1]:.0f}", f"{padding:.1%}", len(steps), num_labels, f"{seconds:.1f}")
    own, *others = rates
    print(f"\nratio {own / max(others):.2f} (goal: at least 1.7, with a padding of ours of at most 6 %)")


if __name__ == "__main__":
    main()
