"""How much of an allreduce is hidden behind the computation of the gradients, and the step beside MLX's own ring.

Two ranks compute 64 MB of gradients, one matrix product for each bucket, which takes about as long as to reduce them,
and three times as long. `compute` is that alone and `alone` the allreduce of arrays that are ready; in a `step`
all_reduce takes the buckets from a generator that computes them, as in training. `hidden` is what the step saves of the
shorter of the two. The ring's steps evaluate one graph with an `all_sum` of every gradient, on the stream that computes
or on one of their own. All take turns, every round is as slow as its slowest rank, and medians are shown.

    uv run python tests/benchmarks/overlap.py
    sudo .venv/bin/python tests/benchmarks/networks.py --modes overlap
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_distributed.comm.base import Communicator, Parts

NUM_BUCKETS, SIDE = 16, 1024
"""Each is a matrix of so many rows and columns: 4 MB."""
RATIOS = (3.0, 1.0)
"""Of the computation to the communication, about."""
DEPTHS = 128, 512
"""Of the matrix products from whose times that of any other follows."""
NUM_CALIBRATIONS = 3

Times = Mapping[str, Sequence[float]]
"""Seconds of each side by round."""


def time_sides(comm: Communicator, ratio: float, num_rounds: int) -> dict[str, list[float]]:
    """Of one rank, in a process that has joined MLX's ring too."""
    import mlx.core as mx

    from mlx_distributed.comm.buckets import make_layout

    ring, stream = mx.distributed.init(strict=True, backend="ring"), mx.new_stream(mx.cpu)
    layout = make_layout({f"{index:02}": mx.zeros((SIDE, SIDE)) for index in range(NUM_BUCKETS)})

    def gradients(depth: int) -> Iterator[mx.array]:
        """Not yet evaluated."""
        left, right = mx.full((SIDE, depth), 0.5), mx.full((depth, SIDE), 0.25)
        mx.eval(left, right)
        for _ in range(NUM_BUCKETS):
            yield left @ right

    def parts(depth: int) -> Iterator[Parts]:
        for gradient in gradients(depth):
            mx.eval(gradient)
            yield {(comm.rank, comm.rank + 1): [gradient]}

    def compute(depth: int) -> None:
        for _ in parts(depth):
            pass

    def step(given: Iterable[Parts]) -> None:
        mx.eval(comm.all_reduce(layout, comm.size, given, "the benchmark"))

    def ring_step(depth: int, stream: mx.Stream | None) -> None:
        mx.eval([mx.distributed.all_sum(each, group=ring, stream=stream) for each in gradients(depth)])

    def seconds(side: Callable[[], None]) -> float:
        comm.barrier("the next turn")
        start_s = time.perf_counter()
        side()
        return time.perf_counter() - start_s

    def calibrated(side: Callable[[], None]) -> float:
        own_s = statistics.median(seconds(side) for _ in range(NUM_CALIBRATIONS))
        return max(float(each) for each in comm.all_gather(mx.array(own_s), "a time"))

    ready = list(parts(1))
    step(ready)  # makes buffers
    alone_s = calibrated(lambda: step(ready))
    few_s, many_s = (calibrated(partial(compute, depth)) for depth in DEPTHS)
    slope = (many_s - few_s) / (DEPTHS[1] - DEPTHS[0])
    depth = max(round(DEPTHS[0] + (ratio * alone_s - few_s) / slope), 1)
    sides = {
        "compute": lambda: compute(depth),
        "alone": lambda: step(ready),
        "step": lambda: step(parts(depth)),
        "ring": lambda: ring_step(depth, None),
        "ring, own stream": lambda: ring_step(depth, stream),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            times[name].append(seconds(side))
    return times


class Rows:
    """The table, a row for each measurement."""

    def __init__(self, *first: str) -> None:
        names = ("compute, s", "alone, s", "step, s", "compute / alone", "hidden", "ring / step", "own stream / step")
        self._table = Table(*first, *names)

    def print(self, *first: object, ranks: Sequence[Times]) -> None:
        """The figures of one measurement, from the times of all ranks."""
        medians_s = {
            name: statistics.median(map(max, *(times[name] for times in ranks)))  # of a round, its slowest rank
            for name in ranks[0]
        }
        compute_s, alone_s, step_s, ring_s, own_stream_s = medians_s.values()
        hidden = (compute_s + alone_s - step_s) / min(compute_s, alone_s)
        shares = (compute_s / alone_s, hidden, ring_s / step_s, own_stream_s / step_s)
        seconds = (f"{value:.4f}" for value in (compute_s, alone_s, step_s))
        self._table.print(*first, *seconds, *(f"{value:.2f}" for value in shares))


GOALS = "goals: hidden 0.85 where compute takes 3 times as long, 0.60 where as long; ring / step 1.15"


def work(comm: Communicator, num_rounds: int) -> list[dict[str, list[float]]]:
    """As one rank, the times of each ratio. To be called through `run_group`."""
    join_ring_of(comm)
    return [time_sides(comm, ratio, num_rounds) for ratio in RATIOS]


def join_ring_of(comm: Communicator) -> None:
    """Join MLX's ring with the ranks of a group on this machine."""
    import mlx.core as mx
    import numpy as np

    from mlx_distributed.cli.bench.sides import free_address, join_ring

    with free_address() as address:
        everyone = comm.all_gather(mx.array(np.frombuffer(address.encode(), np.uint8)), "the addresses")
    join_ring(comm.rank, [np.asarray(each).tobytes().decode() for each in everyone])


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=11, help="default: 11")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        rows = Rows("link")
        for ranks in zip(*run_group(work, 2, options.rounds), strict=True):
            rows.print("loopback", ranks=ranks)
    print(f"\n{GOALS}")


if __name__ == "__main__":
    main()
