"""Label tokens per second of mlx-train against the training loop of mlx_lm.lora, on an Alpaca file.

Both sides train the same new model (its tokenizer trained on the file) with the same LoRA layers, rank 8 on all linear
layers, on the same rows, 8 and then 16 a step, prompts masked, for one epoch in a process of their own. mlx_lm.lora's
loop is run as it is by default, its step compiled, and with MLX_DISABLE_COMPILE=1; the faster of the two counts. Ours
is run in every way to lay out a step: rows of similar length side by side, packed, and both within a budget of tokens.
Each has its ratio: on a busy machine the best of several is no figure. A label token is a token of an answer or its
stop token; padding that is trained on is none. Time is that of the steps alone: loading, tokenising, composing batches
(on their side) and the first steps are left out.

    uv run python tests/benchmarks/throughput.py --data alpaca.json
    uv run python tests/benchmarks/throughput.py --data alpaca.json --batch-sizes 16 --steps 30 --rounds 5
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

GOALS = {8: 2.1, 16: 2.4}
"""Ratio of label tokens per second, by rows of a step."""
MOST_PADDING = {False: 0.06, True: 0.02}
"""By whether rows are packed."""
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
    """Steps of mlx_lm.lora's own loop, in its own order of batches. To be called through `fresh`."""
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

    batch_size = config.train.global_batch_size
    arguments = TrainingArgs(
        batch_size=batch_size,
        # The last one is not timed: nothing is asked for after it.
        iters=min(len(rows) // batch_size, config.train.max_steps or len(rows)) + 1,
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
    from mlx_distributed.cli.parts import load_rows, make_plan
    from mlx_distributed.config import load_config
    from mlx_distributed.data.batch import make_batch

    config = load_config(config_file)
    _, rows = load_rows(config)
    plan = make_plan(config, rows)
    steps = []
    for number, step_s in enumerate(steps_s):
        microbatches = [[rows.train[row] for row in rows_of] for rows_of in plan.microbatches(number)]
        batches = [make_batch(taken, config) for taken in microbatches]
        num_tokens = sum(len(row.tokens) for taken in microbatches for row in taken)
        num_positions = sum(batch.tokens.size for batch in batches)
        steps.append(Step(sum(batch.num_labels for batch in batches), num_tokens, num_positions, step_s))
    return steps


class Side(NamedTuple):
    """A loop in one of its ways."""

    run: Callable[[Path], list[Step]]
    packed: bool | None = None
    """Whether rows are; None of the peer."""


def sides_of(config: dict[str, Any], batch_size: int, budget: int) -> dict[str, Side]:
    """All ways to train on so many rows a step."""

    def settings(packing: bool, **train: int) -> dict[str, Any]:
        data, of_step = config["data"] | {"packing": packing}, {"global_batch_size": batch_size, **train}
        return config | {"data": data, "train": config["train"] | of_step}

    def run_ours(place: Path, settings: dict[str, Any]) -> list[Step]:
        file = write_config(place, settings)
        return fresh(ours, file, [line["perf/step_s"] for line in mlx_train(file).steps])

    def run_peer(place: Path, compiled: bool) -> list[Step]:
        return fresh(peer, write_config(place, settings(False, micro_batch_size=batch_size)), compiled)

    sides = {}
    for packing, layout in ((False, "side by side"), (True, "packed")):
        for limit, train in (
            (f"{batch_size} rows", {"micro_batch_size": batch_size}),
            ("4 rows", {"micro_batch_size": 4}),
            (f"{budget} tokens", {"micro_batch_tokens": budget}),
        ):
            run = partial(run_ours, settings=settings(packing, **train))
            sides[f"mlx-train, {layout}, {limit}"] = Side(run, packing)
    sides["mlx_lm.lora"] = Side(partial(run_peer, compiled=True))
    sides["mlx_lm.lora, MLX_DISABLE_COMPILE=1"] = Side(partial(run_peer, compiled=False))
    return sides


def compare(sides: dict[str, Side], batch_size: int, num_rounds: int, folder: Path) -> None:
    """Run all sides in turns and print their figures."""
    results = interleave({name: side.run for name, side in sides.items()}, num_rounds, folder)
    figures: dict[str, tuple[float, float, int, int, float]] = {}
    for name, runs in results.items():
        steps = runs[0][WARMUP_STEPS:]
        seconds = total_s([[step.step_s for step in run[WARMUP_STEPS:]] for run in runs])
        num_labels = sum(step.num_labels for step in steps)
        padding = 1 - sum(step.num_tokens for step in steps) / sum(step.num_positions for step in steps)
        figures[name] = num_labels / seconds, padding, len(steps), num_labels, seconds
    peer_rate = max(figures[name][0] for name, side in sides.items() if side.packed is None)
    table = Table(
        f"{batch_size} rows a step".ljust(36), "label tokens/s", "ratio", "padding", "steps", "label tokens", "s"
    )
    for name, (rate, padding, num_steps, num_labels, seconds) in figures.items():
        ratio = f"{rate / peer_rate:.2f}"
        table.print(name, f"{rate:.0f}", ratio, f"{padding:.1%}", num_steps, num_labels, f"{seconds:.1f}")
    print(f"\nratio: to the faster loop of mlx_lm.lora (goal: at least {GOALS.get(batch_size, '-')})")
    for packed, most in MOST_PADDING.items():
        padding = max(figures[name][1] for name, side in sides.items() if side.packed is packed)
        print(f"padding {'packed' if packed else 'side by side'}: {padding:.1%} (goal: at most {most:.0%})")
    print()


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="Alpaca file, for example alpaca_en_demo.json")
    args.add_argument("--model", choices=MODELS, default="0.7M", help="number of parameters (default: 0.7M)")
    args.add_argument("--batch-sizes", default="8,16", help="rows of a step (default: 8,16)")
    args.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch (default: 4096)")
    args.add_argument("--steps", type=int, help="of each run (default: an epoch)")
    args.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    options = args.parse_args()

    with workplace(options.blas) as folder:
        model = fresh(build_model, folder / "model", options.data.resolve(), options.model)
        config: dict[str, Any] = {
            "model": {"path": str(model)},
            "data": {"train": str(options.data.resolve())},
            "train": {"max_steps": options.steps},
            "checkpoint": {"steps": None},
        }
        print_machine()
        for batch_size in map(int, options.batch_sizes.split(",")):
            sides = sides_of(config, batch_size, options.budget)
            sides["mlx_lm.lora"].run(folder / f"warm-up-{batch_size}")  # fills the cache of compiled kernels
            compare(sides, batch_size, options.rounds, folder / str(batch_size))


if __name__ == "__main__":
    main()
