"""What it costs in accuracy to send less: the quick start with every wire format, and with workers that agree less.

Ranks train the model of configs/quickstart.yaml, once per seed, and everything starts from the same weights and sees
as many tokens. `loss` is the training loss averaged over the last steps, `held-out` that over the validation rows, both
the mean over the seeds; `against` compares with fp32 in every step, and so does `times fewer` for the bytes that a rank
sends. `no feedback`: what rounding leaves out is lost.

    uv run python tests/benchmarks/accuracy.py
    uv run python tests/benchmarks/accuracy.py --only int8 diloco --seeds 5
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
LAST_STEPS = 50
"""Of the training loss: a single step has too few tokens to compare."""

EXACT = "fp32, every step"
LOSSY = {wire: [f"parallel.wire={wire}"] for wire in ("bf16", "fp16", "int8", "int4")}
DILOCO = ["parallel.sync=diloco", "parallel.wire=int8"]
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
}
"""By name, what is set on the command line besides."""


class Outcome(NamedTuple):
    """Of one run."""

    train_loss: float
    held_out_loss: float
    sent_bytes: float
    """Per rank and step."""


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
        statistics.mean(step.loss for step in steps[-LAST_STEPS:]),
        held_out["eval/loss"],
        statistics.mean(step.sent_bytes for step in steps),
    )


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    args.add_argument("--only", nargs="+", metavar="WORD", help="what is named so, beside fp32 in every step")
    args.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        table = Table("what is sent", "loss", "against", "held-out", "least-most", "against", "KB/step", "times fewer")
        exact: Outcome | None = None
        for name in SIDES:
            if options.only and name != EXACT and not any(word in name for word in options.only):
                continue
            runs = [run_group(train, options.nproc, name, seed)[0] for seed in range(options.seeds)]
            mean = Outcome(*(statistics.mean(values) for values in zip(*runs, strict=True)))
            exact = exact or mean
            held_out = sorted(run.held_out_loss for run in runs)
            table.print(
                name,
                f"{mean.train_loss:.4f}",
                f"{mean.train_loss / exact.train_loss - 1:+.1%}",
                f"{mean.held_out_loss:.4f}",
                f"{held_out[0]:.3f}-{held_out[-1]:.3f}",
                f"{mean.held_out_loss / exact.held_out_loss - 1:+.1%}",
                f"{mean.sent_bytes / 1e3:.1f}",
                f"{exact.sent_bytes / mean.sent_bytes:.1f}",
            )
    print("\ngoals: int8 with feedback within 2 %; diloco within 5 % held-out, a hundred times fewer bytes")


if __name__ == "__main__":
    main()
