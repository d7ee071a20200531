"""Thousands of all_reduces of random sizes: no hang, no leak, every result right.

Each rank is a process of its own. The operations, their sizes and their values follow from a seed, so every rank knows
what has to come out: the canonical sum, bit for bit. The resident memory of each rank is read at regular intervals; it
has settled after a quarter of the time, and from then on it must stay where it is.

    uv run python tests/benchmarks/soak.py
    uv run python tests/benchmarks/soak.py --num-ops 1000 --nproc 2
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from typing import TYPE_CHECKING

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator

NUM_SAMPLES = 40
MAX_ELEMENTS = 600_000
"""Of a bucket: from one element to several chunks."""
MAX_DURATION_S = 4 * 3600.0


def operation(number: int, num_ranks: int) -> tuple[list[int], list[int]]:
    """Elements of each bucket, and the leaves at which the ranges of the ranks begin and end."""
    import numpy as np

    rng = np.random.default_rng(number)
    sizes = [int(MAX_ELEMENTS ** rng.random()) for _ in range(rng.integers(1, 4))]
    edges = [0, *sorted(rng.integers(0, 7, num_ranks - 1).tolist()), 6]
    return sizes, edges


def work(comm: Communicator, num_ops: int) -> list[float]:
    """Do all operations as one rank; returns its resident memory over time. To be called through `run_group`."""
    import mlx.core as mx
    import numpy as np

    from mlx_distributed.comm.buckets import make_layout, to_buckets
    from mlx_distributed.comm.tree_sum import TreeSum

    memory = []
    for number in range(num_ops):
        sizes, edges = operation(number, comm.size)
        layout: tuple = ()
        own: list[dict] = [{} for _ in sizes]
        expected = []
        for index, size in enumerate(sizes):
            # The same on every rank, so that each can tell what has to come out.
            leaves = np.random.default_rng((number, index)).random((edges[-1], size), np.float32)
            whole, mine = TreeSum[np.ndarray](edges[-1]), TreeSum[np.ndarray](edges[-1])
            for leaf in range(edges[-1]):
                whole.put((leaf, leaf + 1), leaves[leaf])
                if edges[comm.rank] <= leaf < edges[comm.rank + 1]:
                    mine.put((leaf, leaf + 1), leaves[leaf])
            expected.append(whole.total)
            layout += make_layout({"values": mx.zeros(size)})
            own[index] = {node: to_buckets(layout[-1:], {"values": mx.array(v)})[0] for node, v in mine.parts.items()}
        mx.eval(own)
        for index, (values,) in enumerate(comm.all_reduce(layout, edges[-1], own, f"operation {number}")):
            if np.asarray(values).tobytes() != expected[index].tobytes():
                raise SystemExit(f"rank {comm.rank}: operation {number} gave a wrong sum")
        if (number + 1) % max(num_ops // NUM_SAMPLES, 1) == 0:
            memory.append(resident_mb())
    return memory


def resident_mb() -> float:
    """Of this process."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) / 1024


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--nproc", type=int, default=3, help="ranks (default: 3)")
    args.add_argument("--num-ops", type=int, default=10_000, help="operations (default: 10000)")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        start_s = time.monotonic()
        memory = run_group(work, options.nproc, options.num_ops, patience_s=MAX_DURATION_S)
        duration_s = time.monotonic() - start_s
    table = Table("rank", "settled, MB", "at the end, MB", "change")
    for rank, samples in enumerate(memory):
        quarter = max(len(samples) // 4, 1)
        settled, end = statistics.mean(samples[quarter : 2 * quarter]), statistics.mean(samples[-quarter:])
        table.print(rank, f"{settled:.0f}", f"{end:.0f}", f"{end / settled - 1:+.1%}")
    print(f"\n{options.num_ops} operations, every result right, {duration_s:.0f} s; goal: memory flat within 5 %")


if __name__ == "__main__":
    main()
