"""`Beside`: what a rank does beside steps: tells, evaluates, saves, and finishes the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mlx_distributed.cli.load import Loaded, load_whole
from mlx_distributed.cli.report import comparison, next_steps, sample_lines, step_metrics
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.models import save_final
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import Trackers
from mlx_distributed.train.checkpoint import Checkpointer, CheckpointMeta
from mlx_distributed.train.evaluation import Sample, evaluate_generation
from mlx_distributed.train.hooks import Evaluate, Save, due, every
from mlx_distributed.train.setup import exchange_layout
from mlx_distributed.train.stage_files import gather_model
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo


class Beside:
    """For one group. Rank 0 saves, tracks and speaks; the others compute their part of what is measured.

    Args:
        config: of the run.
        run_id: of the run.
        wandb_id: of the run.
        loaded: data and model.
        state: the same on every rank.
        comm: the group.
        checkpointer: used on rank 0 only.
        trackers: of this rank.
        num_steps: how many steps are committed at once with a step, which is the last of them.
        mesh: the axes of the group; None where it is one of them.
    """

    def __init__(
        self,
        config: Config,
        run_id: str,
        wandb_id: str,
        loaded: Loaded,
        state: TrainState,
        comm: Communicator,
        checkpointer: Checkpointer,
        trackers: Trackers,
        num_steps: Callable[[int], int] = lambda step: 1,
        mesh: Mesh | None = None,
    ) -> None:
        self._config, self._run_id, self._wandb_id = config, run_id, wandb_id
        self._loaded, self._state, self._comm, self._trackers = loaded, state, comm, trackers
        self._num_steps = num_steps
        layout = exchange_layout(state.parameters, config)
        self.save = Save(checkpointer, comm, layout, trackers, self._describe)
        self.save.mark(state)
        best = self.save if config.checkpoint.keep_best else None
        self._mesh = mesh or Mesh(dp=comm)
        self.evaluate = Evaluate(
            loaded.rows.validation,
            config.train.micro_batch_size,
            self._mesh.dp,
            trackers,
            best,
            loaded.staged.pipeline if loaded.staged else None,
        )
        self._tell = every(config.logging.steps, self._log)

    def introduce(self) -> None:
        """Say what is trained on, and what."""
        plan = self._loaded.plan
        for line in self._loaded.rows.report.lines():
            self._trackers.message(line)
        layout = (
            self._loaded.staged.layout if self._loaded.staged else exchange_layout(self._state.parameters, self._config)
        )
        num_trained = sum(bucket.size for bucket in layout)
        self._trackers.message(
            f"{self._config.method}: {num_trained:,} parameters trained; {plan.num_steps} steps of "
            f"{plan.global_batch_size} rows in {plan.num_microbatches} micro-batches; {self._comm.size} workers"
        )

    def at_start(self) -> dict[str, float]:
        """The figures that those at the end are compared with."""
        if not self._config.eval.at_start or self._state.step:
            return {}
        self.evaluate(self._state)
        return self._state.metrics | (self._generate()[0] if self._config.eval.generate else {})

    def after_step(self, info: StepInfo | None) -> None:
        """What is due after a step: to tell of the one that `info` is of, and where that is the last one taken, or none
        is given, to evaluate and to save."""
        state = self._state
        if info is not None:
            self._warn(info)
            self._tell(state, info)
        if info is None or info.step == state.step:
            num_steps = self._num_steps(state.step)
            if due(self._config.eval.steps, state.step, num_steps):
                self.evaluate(state)
            if due(self._config.checkpoint.steps, state.step, num_steps):
                self.save(state)

    def finish(self, before: Mapping[str, float]) -> None:
        """Write `final/`, and say how the model has become; the state has been evaluated."""
        after: dict[str, float] = dict(self._state.metrics)
        samples: list[Sample] = []
        if self._config.eval.generate:
            metrics, samples = self._generate()
            after |= metrics
        model = self._loaded.model
        if self._loaded.staged is not None:
            model = gather_model(
                model, lambda: load_whole(self._config, self._loaded.tokenizer), self._mesh.pp.size, self._comm
            )
        if self._comm.rank == 0:
            config, loaded = self._config, self._loaded
            final = config.output_dir / "final"
            save_final(
                final, model, loaded.tokenizer, loaded.architecture,
                source=config.model, method=config.method, lora=config.lora,
            )  # fmt: skip
            for line in [
                *comparison(before, after),
                *sample_lines(samples[: config.eval.num_samples]),
                *next_steps(config, final, loaded.example_prompt),
            ]:
                self._trackers.message(line)

    def _generate(self) -> tuple[dict[str, float], list[Sample]]:
        """Exact match of greedy answers to validation prompts, and the answers."""
        rows = self._loaded.rows.validation[: self._config.eval.max_examples]
        samples = evaluate_generation(
            self._state.model, self._loaded.tokenizer, rows, self._config.eval.max_new_tokens, self._comm
        )
        metrics = {"eval/exact_match": sum(sample.exact for sample in samples) / len(samples)}
        self._trackers.log(metrics, self._state.step)
        return metrics, samples

    def _describe(self, state: TrainState) -> CheckpointMeta:
        return CheckpointMeta(
            step=state.step,
            num_tokens=state.num_tokens,
            num_skipped=state.num_skipped,
            run_id=self._run_id,
            wandb_id=self._wandb_id,
            facts=self._loaded.facts,
            metrics=state.metrics,
        )

    def _warn(self, info: StepInfo) -> None:
        if info.skipped:
            self._trackers.message(f"{info.skipped}; the step is skipped")

    def _log(self, state: TrainState, info: StepInfo) -> None:
        self._trackers.log(step_metrics(info), info.step)
