"""`Beside`: what a rank does beside steps: tells, evaluates, saves, and finishes the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from mlx_distributed.cli.data_report import record_data
from mlx_distributed.cli.load import Loaded
from mlx_distributed.cli.measure import make_evaluate, pays_no_more
from mlx_distributed.cli.parts import load_whole
from mlx_distributed.cli.plan.budget import verdict
from mlx_distributed.cli.report import comparison, next_steps, sample_lines, step_metrics
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.models import save_final
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import Trackers
from mlx_distributed.train.best import share_evaluations, to_lines
from mlx_distributed.train.checkpoint import Checkpoint, Checkpointer, CheckpointMeta, best
from mlx_distributed.train.hooks import Save, due, every
from mlx_distributed.train.setup import exchange_layout
from mlx_distributed.train.stage_files import finished, give_finished
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
        self._num_steps, self._checkpointer = num_steps, checkpointer
        layout = exchange_layout(state.parameters, config)
        self.save = Save(checkpointer, comm, layout, trackers, self._describe)
        self.save.mark(state)
        self._mesh = mesh or Mesh(dp=comm)
        save_best = self.save if config.checkpoint.keep_best else None
        self.evaluate = make_evaluate(config, loaded, comm, self._mesh, trackers, save_best)
        state.evaluations = share_evaluations(state.evaluations, state.step, comm)
        self._tell = every(config.logging.steps, self._log)

    def introduce(self) -> None:
        """Say what is trained on, and what."""
        plan = self._loaded.plan
        report = self._loaded.rows.report
        if self._comm.rank == 0:
            record_data(self._config.output_dir, report)
        for line in report.lines():
            self._trackers.message(line)
        layout = (
            self._loaded.staged.layout if self._loaded.staged else exchange_layout(self._state.parameters, self._config)
        )
        if self._loaded.staged:
            self._trackers.message(self._loaded.staged.reason)
        num_trained = sum(bucket.size for bucket in layout)
        precision = "" if self._config.precision == "fp32" else f" in {self._config.precision}"
        self._trackers.message(
            f"{self._config.method}{precision}: {num_trained:,} parameters trained; {plan.num_steps} steps of "
            f"{plan.global_batch_size} rows in {plan.num_microbatches} micro-batches; {self._comm.size} workers"
        )

    def at_start(self) -> dict[str, float]:
        """The figures that those at the end are compared with."""
        if not self._config.eval.at_start or self._state.step:
            return {}
        self.evaluate(self._state)
        return self._state.metrics

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

    @property
    def stops_early(self) -> bool:
        """Whether evaluations say that it does not pay to go on; the same on every rank."""
        return pays_no_more(self._config, self._state)

    def evaluate_last(self) -> None:
        """Evaluate, unless all ranks have the figures of this very state."""
        mine = mx.array(bool(self._state.metrics))
        if not all(known.item() for known in self._comm.all_gather(mine, "whether the model is evaluated")):
            self.evaluate(self._state)

    def finish(self, before: Mapping[str, float]) -> None:
        """Write `final/`, and say how the model has become; the state has been evaluated."""
        config, loaded, state, model = self._config, self._loaded, self._state, self._loaded.model
        chosen, trained = self._best(), None
        if loaded.staged is not None:
            wanted = self._comm.broadcast(mx.array(chosen is None), 0, "whether the last model is the finished one")
            if self._comm.rank == 0:
                model = load_whole(config, loaded.tokenizer)
                trained = finished(loaded.model, model, loaded.staged.worker_of, self._comm)
            elif wanted.item():
                give_finished(model, loaded.staged.worker_of, self._comm)
        if self._comm.rank:
            return
        if state.step < loaded.plan.num_steps:
            self._trackers.message(
                f"stopped early after step {state.step}: in {config.eval.patience} evaluations "
                f"{config.checkpoint.metric_for_best} has not become better by more than {config.eval.min_delta:g}"
            )
        if loaded.expected_bytes is not None and (line := verdict(loaded.expected_bytes, mx.get_peak_memory())):
            self._trackers.message(line)
        if chosen is not None:
            trained = (array for _, array in chosen.each_parameter())
        final = config.output_dir / "final"
        save_final(
            final, model, loaded.tokenizer, loaded.architecture,
            source=config.model, method=config.method, lora=config.lora, trained=trained,
        )  # fmt: skip
        samples = self.evaluate.samples[: config.eval.num_samples]
        if chosen is not None:
            self._trackers.message(f"final/ holds the best checkpoint, of step {chosen.meta.step}")
            samples = []  # They are the last model's.
        step, metrics = (state.step, state.metrics) if chosen is None else (chosen.meta.step, chosen.meta.metrics)
        self._trackers.final(final, step, metrics)
        for line in [
            *comparison(before, metrics),
            *sample_lines(samples),
            *next_steps(config, final, loaded.example_prompt),
        ]:
            self._trackers.message(line)

    def _best(self) -> Checkpoint | None:
        """What `final/` is to hold in place of the last state; None where it is that, or on other ranks than 0."""
        if self._config.checkpoint.final == "last" or self._comm.rank:
            return None
        found = best(self._checkpointer.folder, self._trackers.message, self._checkpointer.metric)
        return found if found is not None and found.meta.step != self._state.step else None

    def _describe(self, state: TrainState) -> CheckpointMeta:
        return CheckpointMeta(
            step=state.step,
            num_tokens=state.num_tokens,
            num_skipped=state.num_skipped,
            run_id=self._run_id,
            wandb_id=self._wandb_id,
            facts=self._loaded.facts,
            metrics=state.metrics,
            evaluations=to_lines(self._config.checkpoint.metric_for_best, state.evaluations),
        )

    def _warn(self, info: StepInfo) -> None:
        if info.skipped:
            scale = self._state.loss_scale
            after = "" if scale is None else f"; from now on the loss is scaled by {scale.value:g}"
            self._trackers.message(f"{info.skipped}; the step is skipped{after}")

    def _log(self, state: TrainState, info: StepInfo) -> None:
        scaled = {} if state.loss_scale is None else {"train/loss_scale": state.loss_scale.value}
        self._trackers.log(step_metrics(info) | scaled, info.step)
