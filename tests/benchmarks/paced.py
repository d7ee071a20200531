"""`mlx-train` with workers that take as long for a micro-batch as is wanted, and write down which they have computed.

A micro-batch is computed and added, and the rest of `PACE_S` is slept through: so four cores are enough for three
workers, one can be made slower than another, and a step takes the same time again and again. A line of the file
`PACE_LOG` is the step and the number of the micro-batch in it, from 0.

    python paced.py join STRING FOLDER
    python paced.py train FILE
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_distributed.comm.base import Parts
    from mlx_distributed.comm.buckets import Arrays
    from mlx_distributed.train.phases import Phases, Sums, Work
    from mlx_distributed.train.state import TrainState

MODULE = "paced"


def join(text: str, folder: str) -> int:
    """As `mlx-train --join`."""
    from mlx_distributed.cli.elastic.join import join

    return join(text, None, Path(folder), debug=False, module=MODULE)


def train(file: str) -> int:
    """As `mlx-train --config`, not elastic."""
    from mlx_distributed.cli import local, train

    # The program takes no other module for a worker, but where tests want one.
    vars(train)["LocalGroup"] = partial(local.LocalGroup, module=MODULE)
    return train.main(["--config", file])


def pace(seconds: float, log: Path) -> None:
    """Have every micro-batch of this process take so long."""
    import mlx.core as mx

    from mlx_distributed.train.phases import Phases

    plain, gradients = Phases.add, Phases.gradients
    file = log.open("a", buffering=1, encoding="utf-8")

    def add(
        self: Phases,
        state: TrainState,
        work: Work,
        sums: Sums,
        leaves: Sequence[int],
        check: Callable[[], None],
        keep: bool,
    ) -> Iterator[Parts]:
        left, begun_s = iter(leaves), time.monotonic()

        def check_in_time() -> None:
            nonlocal begun_s
            time.sleep(max(begun_s + seconds - time.monotonic(), 0.0))
            begun_s = time.monotonic()
            file.write(f"{work.step} {next(left)}\n")
            check()

        return plain(self, state, work, sums, leaves, check_in_time, keep)

    def computed(*args: Any) -> tuple[mx.array, Arrays]:
        # The last micro-batch of a step would be computed after its time, while others are on their way.
        found = gradients(*args)
        mx.eval(found)
        return found

    Phases.add, Phases.gradients = add, computed  # type: ignore[method-assign]


def be_worker(fd: int) -> int:
    """As `mlx_distributed.cli.worker`."""
    from mlx_distributed.cli.worker import main

    pace(float(os.environ["PACE_S"]), Path(os.environ["PACE_LOG"]))
    return main(fd, debug=False)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb.isdigit():
        code = be_worker(int(verb))
        sys.stdout.flush()
        os._exit(code)
    from mlx_distributed.cli.errors import run

    raise SystemExit(run(lambda: join(*arguments) if verb == "join" else train(*arguments), debug=False))
