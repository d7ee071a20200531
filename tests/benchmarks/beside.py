"""What the transport costs the thread that trains: its rate while buckets are on their way, compared with none.

Two ranks do some work, again and again, in the generator that all_reduce takes its buckets from: there training
computes. The buckets are ready and hold 4 MB; each is followed by work for half of the time that it takes to reduce it,
so that there is always something to send. `rate` is how much the training thread gets done, beside the same with a
`LocalComm`, which sends nothing; `beside` is how fast the buckets are summed meanwhile, and `alone` without any work.
All take turns, every round is as slow as its slowest rank, and medians are shown.

    uv run python tests/benchmarks/beside.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator, Parts

NUM_BUCKETS, SIDE = 32, 1024
"""Each is a matrix of so many rows and columns."""
GOALS = {"large MLX kernels": 0.95, "many tiny MLX operations": 0.85, "a Python loop": None}


def kinds_of_work() -> dict[str, Callable[[], object]]:
    """A millisecond or a few of each."""
    import mlx.core as mx

    rows, matrix, few = mx.full((128, SIDE), 0.5), mx.full((SIDE, SIDE), 0.25), mx.zeros(16)
    mx.eval(rows, matrix, few)

    def tiny() -> None:
        values = few
        for _ in range(300):
            values = values + few
        mx.eval(values)

    return dict(zip(GOALS, (lambda: mx.eval(rows @ matrix), tiny, lambda: sum(range(50_000))), strict=True))


def work(comm: Communicator, num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """As one rank, by kind of work, the seconds of each side by round. To be called through `run_group`."""
    import mlx.core as mx

    from mlx_distributed.comm.base import LocalComm
    from mlx_distributed.comm.buckets import make_layout

    arrays = {f"{index:02}": mx.full((SIDE, SIDE), 0.5) for index in range(NUM_BUCKETS)}
    mx.eval(arrays)
    layout = make_layout(arrays)

    def reduce(comm: Communicator, unit: Callable[[], object], num_units: int) -> tuple[float, float]:
        """Seconds of all work and of all."""
        worked_s = 0.0

        def parts() -> Iterator[Parts]:
            nonlocal worked_s
            for array in arrays.values():
                yield {(comm.rank, comm.rank + 1): [array]}
                start_s = time.perf_counter()
                for _ in range(num_units):
                    unit()
                worked_s += time.perf_counter() - start_s

        start_s = time.perf_counter()
        mx.eval(comm.all_reduce(layout, comm.size, parts(), "the benchmark"))
        return worked_s, time.perf_counter() - start_s

    def together(comm_of_side: Communicator, unit: Callable[[], object], num_units: int) -> tuple[float, float]:
        comm.barrier("the next turn")
        return reduce(comm_of_side, unit, num_units)

    def slowest(seconds: float) -> float:
        return max(float(each) for each in comm.all_gather(mx.array(seconds), "a time"))

    local = LocalComm()
    times: dict[str, dict[str, list[float]]] = {}
    for name, unit in kinds_of_work().items():
        together(comm, unit, 1)  # makes buffers
        alone_s = slowest(together(comm, unit, 0)[1])
        unit_s = slowest(together(local, unit, 1)[0]) / NUM_BUCKETS
        num_units = max(round(alone_s / NUM_BUCKETS / 2 / unit_s), 1)
        of_kind: dict[str, list[float]] = {"idle": [], "busy": [], "beside": [], "alone": []}
        for _ in range(num_rounds):
            of_kind["idle"].append(together(local, unit, num_units)[0])
            worked_s, all_s = together(comm, unit, num_units)
            of_kind["busy"].append(worked_s)
            of_kind["beside"].append(all_s)
            of_kind["alone"].append(together(comm, unit, 0)[1])
        times[name] = of_kind
    return times


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=11, help="default: 11")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        ranks = run_group(work, 2, options.rounds)
        table = Table("work                    ", "rate", "goal", "beside, GB/s", "alone, GB/s")
        for name, goal in GOALS.items():
            idle_s, busy_s, beside_s, alone_s = (
                statistics.median(map(max, *(times[name][side] for times in ranks))) for side in ranks[0][name]
            )
            speeds = (f"{NUM_BUCKETS * SIDE**2 * 4e-9 / seconds:.2f}" for seconds in (beside_s, alone_s))
            table.print(name, f"{idle_s / busy_s:.2f}", goal or "-", *speeds)


if __name__ == "__main__":
    main()
