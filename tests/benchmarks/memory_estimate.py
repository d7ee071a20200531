"""The memory that `mlx-distributed plan` foretells against the peak that a run of mlx-train has measured.

By default full training, LoRA and QLoRA (4 bits), with and without gradient checkpointing and in each precision, of
models of 0.7 M to 50 M parameters, in micro-batches of 4 rows of 128 tokens. With `--layouts` the ways in which rows
are put together, long and short rows, workers that shard their moments or agree late, evaluations and checkpoints, of
models of 10 M parameters; and other architectures. Each run is in a process of its own, and the peak is that of
`mx.get_peak_memory` of the first worker after the last step (`perf/peak_memory_bytes`): all that MLX has allocated
since it was loaded, without its cache of freed memory and without Python.

    uv run python tests/benchmarks/memory_estimate.py
    uv run python tests/benchmarks/memory_estimate.py --models 10M --precisions fp32 --microbatches 1
    uv run python tests/benchmarks/memory_estimate.py --layouts
    uv run python tests/benchmarks/memory_estimate.py --layouts packed delayed
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
SHORT, MIXED, WHOLE, LONG = (8, 24), (8, 100), (128, 128), (1024, 1024)
"""Words of an answer: a word is a token or a few."""
NARROW: dict[str, Any] = {"train": {"micro_batch_size": 1}, "data": {"max_seq_length": 64}}
"""So little to compute that what is kept and updated takes the most."""
GENERATE = {"steps": 1, "generate": True, "max_new_tokens": 4}
DILOCO = {"sync_every": 4, "fragments": 2, "overlap_steps": 1}
TWO, THREE = {"nproc": 2}, {"nproc": 3}
LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "packed": (MIXED, {"data": {"packing": True}, "train": {"micro_batch_size": 16}}),
    "packed whole": (WHOLE, {"data": {"packing": True}}),
    "packed tokens": (MIXED, {"data": {"packing": True}, "train": {"micro_batch_tokens": 512}}),
    "micro_batch_tokens": (MIXED, {"train": {"micro_batch_tokens": 512}}),
    "1 row": (WHOLE, {"train": {"micro_batch_size": 1}}),
    "16 rows": (WHOLE, {"train": {"micro_batch_size": 16}}),
    "64 tokens": (WHOLE, {"data": {"max_seq_length": 64}}),
    "1024 tokens": (LONG, {"data": {"max_seq_length": 1024}, "train": {"micro_batch_size": 1}}),
    "1024 but short": (SHORT, {"data": {"max_seq_length": 1024}}),
    "evaluated": (WHOLE, {"eval": {"steps": 1}, "train": {"micro_batch_size": 1}}),
    "answering": (WHOLE, {"eval": GENERATE, "train": {"micro_batch_size": 1}}),
    "saved": (WHOLE, {**NARROW, "checkpoint": {"steps": 1}}),
    "2 workers": (WHOLE, {**NARROW, "parallel": TWO}),
    "shard 2": (WHOLE, {"optimizer": {"shard": True}, "parallel": TWO}),
    "shard 2 narrow": (WHOLE, {**NARROW, "optimizer": {"shard": True}, "parallel": TWO}),
    "shard 3 narrow": (WHOLE, {**NARROW, "optimizer": {"shard": True}, "parallel": THREE}),
    "delayed": (WHOLE, {"parallel": {**TWO, "sync": "delayed"}}),
    "delayed narrow": (WHOLE, {**NARROW, "parallel": {**TWO, "sync": "delayed"}}),
    "compensated": (WHOLE, {**NARROW, "parallel": {**TWO, "sync": "delayed", "delay_compensation": 0.04}}),
    "diloco": (WHOLE, {"parallel": {**TWO, "sync": "diloco", "diloco": {"sync_every": 4}}}),
    "diloco late": (WHOLE, {**NARROW, "parallel": {**TWO, "sync": "diloco", "diloco": DILOCO}}),
}
"""Words of the answers, and settings."""
ARCHITECTURES = ("llama", "qwen2", "phi3")
"""Others than qwen3."""
Case = tuple[str, dict[str, Any]]
"""Name and configuration."""


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


def make_config(model: Path, data: Path, method: str, num: int, checkpointing: bool, more: dict[str, Any]) -> Any:
    """Of a run of `NUM_STEPS` steps, or of six where workers agree late, of `num` micro-batches."""
    late = more.get("parallel", {}).get("sync")
    size = more.get("train", {}).get("micro_batch_size", MICRO_BATCH_SIZE)
    config: dict[str, Any] = {
        "model": {"path": str(model)} | ({"quantize": {"bits": 4}} if method == "qlora" else {}),
        "method": "full" if method == "full" else "lora",
        "data": {"train": str(data), "max_seq_length": NUM_TOKENS, "overlong": "truncate"},
        "train": {
            "global_batch_size": size * num,
            "micro_batch_size": size,
            "max_steps": 6 if late else NUM_STEPS,
            "gradient_checkpointing": checkpointing,
        },
        "checkpoint": {"steps": None},
    }
    if "eval" in more:
        config["data"]["validation"] = str(data)
    for key, value in more.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    return config


def sizes(options: Any, folder: Path) -> Iterator[Case]:
    """Models of several sizes, in every way to train them."""
    data = write_rows(folder / "rows.json", num_rows=64, num_words=WHOLE)
    for size in options.models:
        fresh(build_model, folder / size, data, size)
    for case in itertools.product(
        options.models, options.methods, options.precisions, (False, True), options.microbatches
    ):
        size, method, precision, checkpointing, num = case
        name = f"{size} {method} {precision}{' checkpointing' if checkpointing else ''}, {num} micro-batches"
        yield name, make_config(folder / size, data, method, num, checkpointing, {"precision": precision})


def layouts(names: Sequence[str], folder: Path) -> Iterator[Case]:
    """Ways to put rows together, and workers; other architectures."""
    words = write_rows(folder / "words.json", num_rows=64, num_words=WHOLE)
    fresh(build_model, folder / "10M", words, "10M")
    for name in [name for name in LAYOUTS if name in names or not names]:
        num_words, more = LAYOUTS[name]
        data = write_rows(folder / f"{name}.json", num_rows=64, num_words=num_words)
        for method in ("full", "lora"):
            num = 6 if more.get("parallel") == THREE else 4
            yield f"{name}, {method}", make_config(folder / "10M", data, method, num, method == "lora", more)
    for name in [name for name in ARCHITECTURES if name in names or not names]:
        fresh(build_model, folder / name, words, "0.7M", name)
        for method in ("full", "lora"):
            yield f"{name}, {method}", make_config(folder / name, words, method, 1, False, {})


def main() -> None:
    args = parser(__doc__)
    models = ["0.7M", "10M", "50M"]
    args.add_argument("--models", nargs="+", choices=MODELS, default=models, help="default: 0.7M 10M 50M")
    args.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    args.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    args.add_argument("--microbatches", nargs="+", type=int, default=[1, 4], help="per step (default: 1 4)")
    choices = [*LAYOUTS, *ARCHITECTURES]
    args.add_argument("--layouts", nargs="*", choices=choices, help="these in place of sizes (default: all)")
    options = args.parse_args()
    with workplace(options.blas) as folder:
        print_machine()
        table = Table("case".ljust(44), "foretold, MB", "peak, MB", "off by")
        worst = 0.0
        cases = sizes(options, folder) if options.layouts is None else layouts(options.layouts, folder)
        for number, (name, config) in enumerate(cases):
            file = write_config(folder / str(number), config)
            foretold, peak = fresh(foretell, file), mlx_train(file).steps[-1]["perf/peak_memory_bytes"]
            off = foretold / peak - 1
            worst = max(worst, abs(off))
            table.print(name, f"{foretold / 1e6:.1f}", f"{peak / 1e6:.1f}", f"{off:+.1%}")
    print(f"\nworst: {worst:.1%}; goal: at most 10 %")


if __name__ == "__main__":
    main()
