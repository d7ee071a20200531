"""What it costs in accuracy to send less: the quick start with every wire format, and with workers that agree less.

Ranks train the model of configs/quickstart.yaml, once per seed, and everything starts from the same weights and sees
as many tokens, unless its name says otherwise. `loss` is the training loss averaged over the last steps, `held-out`
that over the validation rows, both the mean over the seeds. `against` compares with fp32 in every step, seed by seed:
the geometric mean of the ratios, with its standard error. Seeds are far apart, most of all with workers that agree
less: to tell 5 % from nothing takes a hundred of them. `fewer` compares the bytes that a rank sends, by step and over
the run. `no feedback`: what rounding leaves out is lost.

    uv run python tests/benchmarks/accuracy.py
    uv run python tests/benchmarks/accuracy.py --only diloco batches --seeds 16
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
LAST = 6
"""One in so many of the steps, at the end, are those of the training loss: a single one has too few tokens."""

EXACT = "fp32, every step"
LOSSY = {wire: [f"parallel.wire={wire}"] for wire in ("bf16", "fp16", "int8", "int4")}
DILOCO = ["parallel.sync=diloco", "parallel.wire=int8"]
HALF = ["train.global_batch_size=8", "train.max_steps=600", "optimizer.learning_rate=3.5e-3"]
"""As many tokens in twice the steps, which cost next to no traffic between exchanges. The rate goes with the root of
the batch (Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms")."""
QUARTER = [
    *("train.global_batch_size=4", "train.micro_batch_size=2"),
    *("train.max_steps=1200", "optimizer.learning_rate=2.5e-3"),
]
SIDES: dict[str, list[str]] = {
    EXACT: [],
    **LOSSY,
    **{f"{wire}, no feedback": settings for wire, settings in LOSSY.items()},
    "delayed": ["parallel.sync=delayed"],
    "delayed, corrected by 10": ["parallel.sync=delayed", "parallel.delay_compensation=10"],
    "diloco int8": DILOCO,
    "diloco int8, 1 step late": [*DILOCO, "parallel.diloco.overlap_steps=1"],
    "diloco int8, momentum 0.9": [*DILOCO, "parallel.diloco.outer_momentum=0.9"],
    "diloco int8, 4 times as often": [*DILOCO, "parallel.diloco.sync_every=8"],
    "diloco int8, twice the tokens": [*DILOCO, "train.global_batch_size=32"],
    "diloco int8, half batches": [*DILOCO, *HALF],
    "diloco int8, quarter batches, every 150": [*DILOCO, *QUARTER, "parallel.diloco.sync_every=150"],
    "fp32, every step, half batches": HALF,
}
"""By name, what is set on the command line besides."""


class Outcome(NamedTuple):
    """Of one run."""

    train_loss: float
    held_out_loss: float
    sent_bytes: float
    """Per rank."""
    num_steps: int


def train(comm: Communicator, name: str, seed: int) -> Outcome:
    """One run of the quick start, as one rank of it. To be called through `run_group`."""
    import mlx.core as mx

    from mlx_distributed.cli.load import load_all
    from mlx_distributed.config import load_config
    from mlx_distributed.data.batch import by_length
    from mlx_distributed.parallel.mesh import Mesh
    from mlx_distributed.train.evaluation import evaluate_loss
    from mlx_distributed.train.phases import Phases
    from mlx_distributed.train.setup import init_state
    from mlx_distributed.train.trainer import Trainer

    mx.disable_compile()  # as mlx-train does on the CPU
    settings = [*SIDES[name], f"parallel.nproc={comm.size}", f"seed={seed}", "checkpoint.steps=null"]
    config = load_config(QUICKSTART, settings)
    loaded = load_all(config, comm)
    state = init_state(loaded.model, config, comm)
    if "no feedback" in name:
        state.feedback.commit = state.feedback.discard  # type: ignore[method-assign]
    steps = list(Trainer(Phases(config, loaded.plan, loaded.rows.train)).steps(state, Mesh(dp=comm)))
    held_out = evaluate_loss(state.model, by_length(loaded.rows.validation, config.train.micro_batch_size), comm)
    return Outcome(
        statistics.mean(step.loss for step in steps[-len(steps) // LAST :]),
        held_out["eval/loss"],
        sum(step.sent_bytes for step in steps),
        len(steps),
    )


def against(found: Sequence[float], exact: Sequence[float]) -> str:
    """By how much losses are higher than others of the same seeds, with the standard error where there are several."""
    logs = [math.log(mine / other) for mine, other in zip(found, exact, strict=True)]
    ratio = math.exp(statistics.mean(logs))
    error = f" +- {ratio * statistics.stdev(logs) / math.sqrt(len(logs)):.1%}" if len(logs) > 1 else ""
    return f"{ratio - 1:+.1%}{error}"


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--seeds", type=int, default=8, help="runs of each (default: 8)")
    args.add_argument("--only", nargs="+", metavar="WORD", help="what is named so, beside fp32 in every step")
    args.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        columns = "loss against held-out against KB/step fewer MB/run fewer"
        table = Table("what is sent", *columns.split())
        exact: list[Outcome] = []
        for name in SIDES:
            if options.only and name != EXACT and not any(word in name for word in options.only):
                continue
            runs = [run_group(train, options.nproc, name, seed)[0] for seed in range(options.seeds)]
            exact = exact or runs
            train_losses, held_out_losses, sent_bytes, num_steps = zip(*runs, strict=True)
            num_bytes, exact_bytes = statistics.mean(sent_bytes), statistics.mean(run.sent_bytes for run in exact)
            table.print(
                name,
                f"{statistics.mean(train_losses):.4f}",
                against(train_losses, [run.train_loss for run in exact]),
                f"{statistics.mean(held_out_losses):.4f}",
                against(held_out_losses, [run.held_out_loss for run in exact]),
                f"{num_bytes / num_steps[0] / 1e3:.1f}",
                f"{exact_bytes / exact[0].num_steps / (num_bytes / num_steps[0]):.1f}",
                f"{num_bytes / 1e6:.2f}",
                f"{exact_bytes / num_bytes:.1f}",
            )
    print("\ngoals: int8 with feedback within 2 %; diloco within 5 % held-out, a hundred times fewer bytes")


if __name__ == "__main__":
    main()
