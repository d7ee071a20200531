"""Memory that the transport holds above the gradients and their sums, also where a rank lags behind the others.

Every rank gives 64 MB of gradients in buckets of 4 MB. The last rank is like the others, or begins to compute 2 s after
them, or stands still for 2 s in the middle, with its whole process. `held` is the peak of what Python holds (copies of
chunks that are sent, chunks that have come), on the rank that holds most; `resident` is by how much the peak of the
resident memory is above gradients and sums (Linux only), which counts the buffers of gRPC too.

    uv run python tests/benchmarks/transport_memory.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator, Parts

NUM_BUCKETS, SIDE = 16, 1024
"""Each is a matrix of so many rows and columns."""
LAG_S = 2.0
LAGS = ("like the others", "begins late", "stands still")
SUMS_MB = NUM_BUCKETS * SIDE**2 * 4 / 1e6


def work(comm: Communicator, wire: str, lag: str) -> tuple[float, float]:
    """As one rank, what is held and what is resident, in MB. To be called through `run_group`."""
    import mlx.core as mx

    from mlx_distributed.comm.buckets import make_layout

    arrays = {f"{index:02}": mx.full((SIDE, SIDE), 0.5) for index in range(NUM_BUCKETS)}
    mx.eval(arrays)
    layout = make_layout(arrays, wire=wire)

    def parts() -> Iterator[Parts]:
        for index, array in enumerate(arrays.values()):
            if comm.rank == comm.size - 1:
                if lag == "begins late" and index == 0:
                    time.sleep(LAG_S)
                if lag == "stands still" and index == NUM_BUCKETS // 2:
                    stand_still()
            yield {(comm.rank, comm.rank + 1): [array]}

    comm.barrier("the beginning")
    before_mb = resident_mb("VmRSS")
    tracemalloc.start()
    summed = comm.all_reduce(layout, comm.size, parts(), "the benchmark")
    figures = tracemalloc.get_traced_memory()[1] / 1e6, resident_mb("VmHWM") - before_mb - SUMS_MB
    del summed
    return figures


def stand_still() -> None:
    """Stop this process for a while."""
    subprocess.Popen(["sh", "-c", f"sleep {LAG_S}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def resident_mb(name: str) -> float:
    """VmRSS is what is resident, VmHWM the peak of it; NaN where there is no such thing."""
    if sys.platform != "linux":
        return float("nan")
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--nproc", nargs="+", type=int, default=[2, 3, 4], help="ranks (default: 2 3 4)")
    args.add_argument("--wires", nargs="+", default=["fp32", "int8"], help="default: fp32 int8")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        table = Table("ranks", "wire", "the last rank   ", "held, MB", "resident, MB", "goal, MB")
        for num_ranks in options.nproc:
            goal_mb = ((num_ranks - 1) * 2 * 2**20 + SIDE**2 * 4) / 1e6
            for wire in options.wires:
                for lag in LAGS:
                    held, resident = map(max, zip(*run_group(work, num_ranks, wire, lag), strict=True))
                    table.print(num_ranks, wire, lag, f"{held:.1f}", f"{resident:.1f}", f"{goal_mb:.1f}")
    print("\ngoal: 2 chunks for each peer and a bucket")


if __name__ == "__main__":
    main()
