"""What it costs in accuracy to compute in 16 bits: 200 steps of the quick start in bf16 and fp16 against fp32.

Ranks train the model of configs/quickstart.yaml, once per seed, from the same weights on the same rows. `loss` is the
training loss averaged over the last steps, `held-out` that over the validation rows, both the mean over the seeds, with
the standard error of the difference. `ahead` is that of the training loss in steps of fp32, at the rate at which its
loss falls at the end. So short a run carries every rounding on to its end: in the second row all is fp32, and only the
weights that it begins with are rounded to bf16, once; what that row shows is the noise of the others. In the last row a
gradient of the last rank is made infinite in the middle of the run: `skipped` is what the ranks say of which steps they
have left out, and all must say the same.

    uv run python tests/benchmarks/precision.py
    uv run python tests/benchmarks/precision.py --seeds 1 --nproc 3
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common import Table, parser, print_machine, run_group, workplace

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_distributed.comm.base import Communicator

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
NUM_STEPS, LAST_STEPS = 200, 50
EARLIER = 10
"""Steps over which the rate is taken at which the loss falls."""
OVERFLOW_AT = NUM_STEPS // 2
ROUNDED, OVERFLOW = "fp32, rounded once", "fp16, overflow"
SIDES = ("fp32", ROUNDED, "bf16", "fp16", OVERFLOW)


class Outcome(NamedTuple):
    """Of one run, as one rank has it."""

    losses: tuple[float, ...]
    """In training, by step."""
    held_out_loss: float
    step_s: float
    skipped: tuple[int, ...]
    scale: float
    digest: str
    """Of the parameters."""

    def train_loss(self, before: int = 0) -> float:
        """Of the last steps, or of as many that end so many steps before the last."""
        return statistics.mean(self.losses[NUM_STEPS - LAST_STEPS - before : NUM_STEPS - before])


def train(comm: Communicator, name: str, seed: int) -> Outcome:
    """One run of the quick start, as one rank of it. To be called through `run_group`."""
    import mlx.core as mx
    from mlx.utils import tree_map

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
    if name == ROUNDED:
        weights = loaded.model.trainable_parameters()
        loaded.model.update(tree_map(lambda weight: weight.astype(mx.bfloat16).astype(mx.float32), weights))
    state = init_state(loaded.model, config, comm)
    phases = (Overflowing if name == OVERFLOW else Phases)(config, loaded.plan, loaded.rows.train)
    steps = list(Trainer(phases).steps(state, Mesh(dp=comm)))
    held_out = evaluate_loss(state.model, by_length(loaded.rows.validation, config.train.micro_batch_size), comm)
    return Outcome(
        tuple(step.loss for step in steps),
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


def ahead(runs: list[Outcome], exact: list[Outcome]) -> str:
    """The difference of the training losses in steps of the exact runs."""
    now, earlier = (statistics.mean(run.train_loss(before) for run in exact) for before in (0, EARLIER))
    return f"{EARLIER * (now - statistics.mean(run.train_loss() for run in runs)) / (earlier - now):+.1f}"


def alike(values: Iterable[str]) -> str:
    """What seeds have to say, once where it is the same."""
    return " ".join(dict.fromkeys(values))


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--seeds", type=int, default=16, help="runs of each (default: 16, for an error of 1 to 2 %%)")
    args.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    options = args.parse_args()
    with workplace(options.blas):
        print_machine()
        header = (
            "precision",
            "loss",
            "against",
            "ahead",
            "held-out",
            "against",
            "step, ms",
            "skipped",
            "scale",
            "ranks",
        )
        table = Table(*header)
        exact: list[Outcome] = []
        for name in SIDES:
            groups = [run_group(train, options.nproc, name, seed) for seed in range(options.seeds)]
            same = all(len({(rank.digest, rank.skipped) for rank in ranks}) == 1 for ranks in groups)
            runs = [ranks[0] for ranks in groups]
            exact = exact or runs
            losses, exact_losses = [run.train_loss() for run in runs], [run.train_loss() for run in exact]
            held_out, exact_held_out = [run.held_out_loss for run in runs], [run.held_out_loss for run in exact]
            table.print(
                name,
                f"{statistics.mean(losses):.4f}",
                compare(losses, exact_losses),
                ahead(runs, exact),
                f"{statistics.mean(held_out):.4f}",
                compare(held_out, exact_held_out),
                f"{1e3 * statistics.median(run.step_s for run in runs):.0f}",
                alike(str(list(run.skipped)) for run in runs),
                alike(f"{run.scale:g}" for run in runs),
                "the same bits" if same else "DIFFERENT",
            )
    print("\ngoal: both losses within 2 % of fp32; the injected overflow skipped by all ranks in the same step")


if __name__ == "__main__":
    main()
