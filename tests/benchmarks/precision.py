"""What it costs in accuracy to compute in 16 bits: 200 steps of the quick start in bf16 and fp16 against fp32.

Ranks train the model of configs/quickstart.yaml, once per seed, from the same weights on the same rows. `loss` is the
training loss averaged over the last steps, `held-out` that over the validation rows, both the mean over the seeds, with
the standard error of the difference: a run of so small a model comes out a few percent higher or lower whatever changes
its rounding. In the last row a gradient of the last rank is made infinite in the middle of the run: `skipped` is what
each rank says of which steps it has left out, and all must say the same.

    uv run python tests/benchmarks/precision.py
    uv run python tests/benchmarks/precision.py --seeds 1 --nproc 3
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from mlx_distributed.comm.base import Communicator

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
NUM_STEPS, LAST_STEPS = 200, 50
OVERFLOW_AT = NUM_STEPS // 2
OVERFLOW = "fp16, overflow"
SIDES = ("fp32", "bf16", "fp16", OVERFLOW)


class Outcome(NamedTuple):
    """Of one run, as one rank has it."""

    train_loss: float
    held_out_loss: float
    step_s: float
    skipped: tuple[int, ...]
    scale: float
    digest: str
    """Of the parameters."""


def train(comm: Communicator, name: str, seed: int) -> Outcome:
    """One run of the quick start, as one rank of it. To be called through `run_group`."""
    import mlx.core as mx

    from mlx_distributed.cli.load import load_all
    from mlx_distributed.comm.buckets import Arrays
    from mlx_distributed.config import load_config
    from mlx_distributed.data.batch import Batch, by_length
    from mlx_distributed.parallel.mesh import Mesh
    from mlx_distributed.train.evaluation import evaluate_loss
    from mlx_distributed.train.phases import Phases
    from mlx_distributed.train.setup import init_state
    from mlx_distributed.train.state import TrainState
    from mlx_distributed.train.trainer import Trainer

    class Overflowing(Phases):
        """Whose gradient is too large for float16 once."""

        def gradients(
            self, state: TrainState, batch: Batch, step: int, index: int, part: int = 0
        ) -> tuple[mx.array, Arrays]:
            loss, gradients = super().gradients(state, batch, step, index, part)
            if step == OVERFLOW_AT and comm.rank == comm.size - 1:
                gradients = {name: gradient * mx.inf for name, gradient in gradients.items()}
            return loss, gradients

    mx.disable_compile()  # as mlx-train does on the CPU
    settings = [f"precision={name[:4]}", f"parallel.nproc={comm.size}", f"seed={seed}", f"train.max_steps={NUM_STEPS}"]
    config = load_config(QUICKSTART, settings)
    loaded = load_all(config, comm)
    state = init_state(loaded.model, config, comm)
    phases = (Overflowing if name == OVERFLOW else Phases)(config, loaded.plan, loaded.rows.train)
    steps = list(Trainer(phases).steps(state, Mesh(dp=comm)))
    held_out = evaluate_loss(state.model, by_length(loaded.rows.validation, config.train.micro_batch_size), comm)
    return Outcome(
        statistics.mean(step.loss for step in steps[-LAST_STEPS:]),
        held_out["eval/loss"],
        statistics.median(step.step_s for step in steps),
        tuple(step.step for step in steps if step.skipped),
        state.scale,
        state.digest()["params"],
    )


def compare(losses: list[float], exact: list[float]) -> str:
    """The difference of the means, and the standard error of that: seeds differ in what rounding does to them."""
    mean = statistics.mean(exact)
    differences = [(loss - other) / mean for loss, other in zip(losses, exact, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return f"{statistics.mean(differences):+.1%} +- {error:.1%}"


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    args.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        table = Table("precision", "loss", "against", "held-out", "against", "step, ms", "skipped", "scale", "ranks")
        exact: tuple[list[float], list[float]] | None = None
        for name in SIDES:
            groups = [run_group(train, options.nproc, name, seed) for seed in range(options.seeds)]
            alike = all(len({(rank.digest, rank.skipped) for rank in ranks}) == 1 for ranks in groups)
            runs = [ranks[0] for ranks in groups]
            loss, held_out = [run.train_loss for run in runs], [run.held_out_loss for run in runs]
            exact = exact or (loss, held_out)
            against = [compare(*pair) for pair in zip((loss, held_out), exact, strict=True)]
            means = [f"{statistics.mean(losses):.4f}" for losses in (loss, held_out)]
            step_ms = f"{1e3 * statistics.median(run.step_s for run in runs):.0f}"
            skipped = " ".join(str(list(run.skipped)) for run in runs)
            scales = " ".join(f"{run.scale:g}" for run in runs)
            words = "the same bits" if alike else "DIFFERENT"
            table.print(name, means[0], against[0], means[1], against[1], step_ms, skipped, scales, words)
    print("\ngoal: both losses within 2 % of fp32; the injected overflow skipped by all ranks in the same step")


if __name__ == "__main__":
    main()
