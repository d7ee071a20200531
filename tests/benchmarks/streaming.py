"""Training on a stream of generated rows against the same program with its rows in memory.

Three figures. Speed: label tokens per second on a stream and on rows in memory, a step of one and a step of the other,
the first not counted; the stream is tokenised meanwhile, and goes through several blocks. Memory: a process trains now
and then while it reads the batches of every step of the stream, and says by how much its resident memory has grown
since the model took its first step on rows in memory; the process that tokenises is counted too. Resume: another
process with no rows on disk begins at the step of row 777,777, and its batches are compared with those of the first.

    uv run python tests/benchmarks/streaming.py
    uv run python tests/benchmarks/streaming.py --rows 100000 --resume-at 77777 --steps 400
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Table, build_model, fresh, parser, print_machine, workplace, write_config

BATCH = {"global_batch_size": 8, "micro_batch_size": 4}
BLOCK_ROWS = 4096
WARMUP_STEPS = 50
NUM_COMPARED = 50
"""Steps after a resume."""
TRAINED_EVERY = 500


def generate(file: Path, num_rows: int, seed: int = 0) -> Path:
    """Alpaca rows, a line each."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubdfgklmnprstvz", k=rng.randint(2, 9))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as out:
        for number in range(num_rows):
            row = {
                "instruction": f"{number} {' '.join(rng.choices(words, k=8))}",
                "output": " ".join(rng.choices(words, k=rng.randint(5, 30))),
            }
            out.write(json.dumps(row) + "\n")
    return file


@dataclass
class Speed:
    """Of all steps of a side but the first ones."""

    num_tokens: int = 0
    taken_s: float = 0.0
    data_s: float = 0.0


def compare(stream_file: Path, memory_file: Path, num_steps: int) -> dict[str, Speed]:
    """Train on both, a step here and a step there, so that a busy machine is busy for both. For `fresh`."""
    from mlx_distributed.cli.load import load_all
    from mlx_distributed.comm.base import LocalComm
    from mlx_distributed.config import load_config
    from mlx_distributed.parallel.mesh import Mesh
    from mlx_distributed.train.phases import Phases
    from mlx_distributed.train.setup import init_state
    from mlx_distributed.train.trainer import Trainer

    sides = {}
    for name, file in (("stream", stream_file), ("memory", memory_file)):
        config = load_config(file)
        loaded = load_all(config, LocalComm())
        steps = Trainer(Phases(config, loaded.plan, loaded.train)).steps(
            init_state(loaded.model, config, LocalComm()), Mesh(LocalComm())
        )
        sides[name] = steps, Speed()
    for number in range(num_steps):
        for steps, speed in list(sides.values())[:: 1 - number % 2 * 2]:
            info = next(steps)
            if number >= WARMUP_STEPS:
                speed.num_tokens += info.num_tokens
                speed.taken_s += info.step_s
                speed.data_s += info.data_s
    return {name: speed for name, (_, speed) in sides.items()}


@dataclass(frozen=True)
class Read:
    """What a process that reads a stream has measured."""

    growth_bytes: int
    """Largest resident memory, of the process that tokenises too, less that after a first step."""
    first_s: float
    """To the rows of the first step."""
    seconds: float
    digests: list[str]
    """Of the batches of the steps that are compared."""
    num_chunks: int
    """Files of tokenised rows afterwards."""


def read_stream(config_file: Path, small_file: Path, begin: int, end: int, compared: int) -> Read:
    """Read the batches of the steps [begin, end), and train on some. To be called through `fresh`."""
    import multiprocessing

    from mlx_distributed.cli.load import load_all
    from mlx_distributed.comm.base import LocalComm
    from mlx_distributed.config import load_config
    from mlx_distributed.parallel.mesh import Mesh
    from mlx_distributed.train.phases import Phases
    from mlx_distributed.train.setup import init_state
    from mlx_distributed.train.trainer import Trainer

    config = load_config(config_file)
    loaded = load_all(config, LocalComm())
    state = init_state(loaded.model, config, LocalComm())
    small = load_all(load_config(small_file), LocalComm())
    Trainer(Phases(config, small.plan, small.train)).train_step(state, Mesh(LocalComm()))
    del small
    before = largest = _resident_bytes(os.getpid())
    phases = Phases(config, loaded.plan, loaded.train)
    trainer, digests, begun_s, first_s = Trainer(phases), [], time.monotonic(), 0.0
    for step in range(begin, end):
        work = phases.work(step)
        batches = [phases.batch(work, number) for number in range(len(work.microbatches))]
        first_s = first_s or time.monotonic() - begun_s
        if compared <= step < compared + NUM_COMPARED:
            arrays = [array.tobytes() for batch in batches for array in (batch.tokens, batch.loss_mask)]
            digests.append(hashlib.sha256(b"".join(arrays)).hexdigest())
        if step % TRAINED_EVERY == 0:
            state.step = step
            trainer.train_step(state, Mesh(LocalComm()))
            others = [_resident_bytes(child.pid) for child in multiprocessing.active_children() if child.pid]
            largest = max(largest, _resident_bytes(os.getpid()) + sum(others))
    num_chunks = len([*(config.output_dir / "cache").glob("*/*.rows")])
    return Read(largest - before, first_s, time.monotonic() - begun_s, digests, num_chunks)


def _resident_bytes(pid: int) -> int:
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) * 1024


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--rows", type=int, default=1_000_000, help="of the stream (default: 1000000)")
    args.add_argument("--resume-at", type=int, default=777_777, metavar="ROW", help="default: 777777")
    args.add_argument("--steps", type=int, default=1200, help="of the comparison of speed (default: 1200)")
    args.add_argument("--model", default="0.7M", help="default: 0.7M")
    options = args.parse_args()
    with workplace(options.blas) as folder:
        print_machine()
        rows = generate(folder / "rows.jsonl", options.rows)
        few = generate(folder / "few.jsonl", options.steps * BATCH["global_batch_size"])
        model = fresh(build_model, folder / "model", few, options.model)
        table = Table("what", "figure", "")

        def config(data: dict[str, Any], max_steps: int) -> dict[str, Any]:
            return {
                "model": {"path": str(model)},
                "data": {"max_seq_length": 512, **data},
                "train": {**BATCH, "max_steps": max_steps, "device": "cpu"},
                "checkpoint": {"steps": None},
            }

        streaming = {"train": str(rows), "streaming": True, "shuffle_buffer": BLOCK_ROWS}

        stream = write_config(folder / "stream", config(streaming, options.steps))
        memory = write_config(folder / "memory", config({"train": str(few)}, options.steps))
        rates = {}
        for name, speed in fresh(compare, stream, memory, options.steps).items():
            rates[name] = speed.num_tokens / speed.taken_s
            table.print(
                f"tokens/s, {name}", f"{rates[name]:,.0f}", f"{speed.data_s / speed.taken_s:.2%} waiting for rows"
            )
        table.print("tokens/s, stream to memory", f"{rates['stream'] / rates['memory']:.3f}", "at least 0.95")

        num_steps, resumed = options.rows // BATCH["global_batch_size"], options.resume_at // BATCH["global_batch_size"]
        whole = write_config(folder / "whole", config(streaming, num_steps))
        late = write_config(folder / "late", config(streaming, num_steps))
        small = write_config(folder / "small", config({"train": str(few)}, num_steps))
        read = fresh(read_stream, whole, small, 0, num_steps, resumed)
        table.print(
            "memory above the model", f"{read.growth_bytes / 1e6:.0f} MB", f"all rows read in {read.seconds:.0f} s"
        )
        again = fresh(read_stream, late, small, resumed, resumed + NUM_COMPARED, resumed)
        same = read.digests == again.digests and len(set(read.digests)) == NUM_COMPARED
        table.print(
            f"resume at row {options.resume_at:,}", "exact" if same else "DIFFERS", f"{NUM_COMPARED} steps compared"
        )
        what = f"{again.num_chunks} of {read.num_chunks} files built"
        table.print("first batch after it", f"{again.first_s:.1f} s", what)


if __name__ == "__main__":
    main()
