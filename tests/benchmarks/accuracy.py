"""What a wire format costs in accuracy: the quick start with each of them, with error feedback and without.

Two ranks train the model of configs/quickstart.yaml, once per seed, and every format starts from the same weights.
`loss` is the training loss averaged over the last steps, `held-out` that over the validation rows, both the mean over
the seeds; `against fp32` compares the losses. Without feedback, what rounding leaves out is lost.

    uv run python tests/benchmarks/wires.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
NUM_RANKS = 2
LAST_STEPS = 50
"""Of the training loss: a single step has too few tokens to compare."""


class Outcome(NamedTuple):
    """Of one run."""

    train_loss: float
    held_out_loss: float
    sent_bytes: float
    """Per rank and step."""


def train(comm: Communicator, wire: str, seed: int, with_feedback: bool) -> Outcome:
    """One run of the quick start, as one rank of it. To be called through `run_group`."""
    import mlx.core as mx

    from mlx_distributed.cli.load import load_all
    from mlx_distributed.config import load_config
    from mlx_distributed.parallel.mesh import Mesh
    from mlx_distributed.train.evaluation import evaluate_loss
    from mlx_distributed.train.trainer import Trainer, init_state

    mx.disable_compile()  # as mlx-train does on the CPU
    config = load_config(QUICKSTART, [f"parallel.wire={wire}", f"seed={seed}"])
    loaded = load_all(config, comm)
    state = init_state(loaded.model, config, comm)
    if not with_feedback:
        state.feedback.commit = state.feedback.discard  # type: ignore[method-assign]
    steps = list(Trainer(config, loaded.plan, loaded.rows.train).steps(state, Mesh(dp=comm)))
    held_out = evaluate_loss(state.model, loaded.rows.validation, config.train.micro_batch_size, comm)
    return Outcome(
        statistics.mean(step.loss for step in steps[-LAST_STEPS:]),
        held_out["eval/loss"],
        statistics.mean(step.sent_bytes for step in steps),
    )


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--seeds", type=int, default=3, help="runs of each format (default: 3)")
    args.add_argument(
        "--wires", nargs="+", default=["bf16", "fp16", "int8", "int4"], help="default: all that are lossy"
    )
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        table = Table("wire", "feedback", "loss", "against fp32", "held-out", "against fp32", "KB per step")
        sides = [("fp32", True), *((wire, kept) for wire in options.wires for kept in (True, False))]
        exact: Outcome | None = None
        for wire, kept in sides:
            runs = [run_group(train, NUM_RANKS, wire, seed, kept)[0] for seed in range(options.seeds)]
            mean = Outcome(*(statistics.mean(values) for values in zip(*runs, strict=True)))
            exact = exact or mean
            feedback = "-" if wire == "fp32" else "kept" if kept else "lost"
            changes = (f"{ours / theirs - 1:+.1%}" for ours, theirs in zip(mean, exact, strict=True))
            train_change, held_out_change, _ = changes
            losses = f"{mean.train_loss:.4f}", train_change, f"{mean.held_out_loss:.4f}", held_out_change
            table.print(wire, feedback, *losses, f"{mean.sent_bytes / 1e3:.0f}")
    print("\ngoal: int8 with feedback within 2 % of fp32")


if __name__ == "__main__":
    main()
