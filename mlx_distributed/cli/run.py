"""One rank of a training run, from its configuration to `final/`: where all the rooms meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.output_dir import accept_config
from mlx_distributed.cli.report import comparison, next_steps, sample_lines, step_metrics
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.errors import CommError, ConfigError
from mlx_distributed.models import save_final
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import ConsoleTracker, Trackers, open_tracker
from mlx_distributed.train.agreement import synchronise
from mlx_distributed.train.checkpoint import Checkpoint, Checkpointer, CheckpointMeta
from mlx_distributed.train.evaluation import Sample, evaluate_generation
from mlx_distributed.train.hooks import Evaluate, Save, current, every
from mlx_distributed.train.private import hand_out
from mlx_distributed.train.setup import exchange_layout, init_state
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.trainer import Trainer


@dataclass(frozen=True)
class Job:
    """What one rank is to do."""

    config: Config
    run_id: str
    wandb_id: str
    resume: str | None = None
    """`auto`, `last`, `best` or the path of a checkpoint; None starts anew."""
    log: bool = True
    """Whether a rank other than 0 reports on its standard output, which is its log file or else the console of all."""
    on_loss: Callable[[], None] = lambda: None
    """Called when a peer was lost, before the last commit is saved, which may take a while."""


def train(job: Job, comm: Communicator, interrupt: Interrupt) -> int:
    """Train as one rank of a group, then leave it; returns the exit status."""
    try:
        choose_device(job.config.train.device)
        status = _Run(job, comm, interrupt).train()
    except BaseException as error:
        comm.close(error)
        raise
    comm.close()
    return status


def choose_device(name: str) -> None:
    """Make MLX compute on `auto`, `cpu` or `gpu`.

    Raises:
        ConfigError: there is no GPU.
    """
    if name != "auto":
        try:
            mx.set_default_device(mx.cpu if name == "cpu" else mx.gpu)
        except ValueError:
            raise ConfigError("train.device=gpu: MLX finds no GPU on this machine; use auto or cpu") from None
    if mx.default_device() == mx.cpu:
        # On the CPU, compiling calls g++ at run time: seconds per kernel, for no more than a few percent.
        mx.disable_compile()


class _Run:
    """A run put together from its parts. Rank 0 saves, tracks and speaks; the state is the same on every rank."""

    def __init__(self, job: Job, comm: Communicator, interrupt: Interrupt) -> None:
        self.job, self.comm, self.interrupt = job, comm, interrupt
        config = self.config = job.config
        self.loaded = load_all(config, comm)
        self.state = init_state(self.loaded.model, config, comm)
        self.wandb_id = job.wandb_id
        checkpointer = Checkpointer(
            config.output_dir / "checkpoints", config.checkpoint.save_total_limit, config.checkpoint.keep_best, print
        )
        first = comm.rank == 0
        checkpoint = self._restore(checkpointer, job.resume) if first and job.resume is not None else None
        synchronise(self.state, comm)
        layout = exchange_layout(self.state.parameters, config)
        hand_out(self.state, layout, checkpoint, comm)
        if first:
            accept_config(config)
        self.trackers = self._open_trackers(resumed=checkpoint is not None)
        self.trainer = Trainer(config, self.loaded.plan, self.loaded.rows.train, lambda: interrupt.requested)
        self.save = Save(checkpointer, comm, layout, self.trackers, self._describe)
        self.save.mark(self.state)
        self.evaluate = Evaluate(
            self.loaded.rows.validation,
            config.train.micro_batch_size,
            comm,
            self.trackers,
            self.save if config.checkpoint.keep_best else None,
        )

    def train(self) -> int:
        """Train to the end, or to where somebody wants it to stop; returns the exit status."""
        with self.trackers:
            try:
                self._introduce()
                before = self._evaluate_at_start()
                self.interrupt.training = True
                if self._loop():
                    self.trackers.message(f"interrupted: step {self.state.step} is saved, --resume goes on from there")
                    self.trackers.finish(INTERRUPTED)
                    return INTERRUPTED
                self.interrupt.training = False
                self._finish(before)
            except BaseException as error:
                self.comm.close(error)  # The peers wait for a word; a tracker may take its time to finish.
                raise
        return 0

    def _loop(self) -> bool:
        """All steps and what happens between them, the last state saved; whether somebody stopped it."""
        hooks = (
            self._warn,
            every(self.config.logging.steps, self._log),
            every(self.config.eval.steps, current(self.evaluate)),
            every(self.config.checkpoint.steps, current(self.save)),
        )
        stopped = False
        try:
            for info in self.trainer.steps(self.state, Mesh(dp=self.comm)):
                for hook in hooks:
                    hook(self.state, info)
                stopped = info.stop_requested
            if not stopped and not self.state.metrics:
                self.evaluate(self.state)
        except CommError:
            self.job.on_loss()
            self.save.alone(self.state)  # The state is that of the last commit, and whole.
            raise
        self.save(self.state)
        return stopped

    def _restore(self, checkpointer: Checkpointer, which: str) -> Checkpoint | None:
        """Take over a checkpoint of this run, where there is one."""
        checkpoint = checkpointer.find(which)
        if checkpoint is None:
            print("nothing to resume from: starting at the beginning")
            return None
        meta = checkpoint.meta
        meta.check_facts(self.loaded.facts)
        # The moments of a shard are handed out, to this rank too, when all ranks have the rest.
        optimizer = dict(checkpoint.optimizer()) if self.state.shard is None else self.state.shared
        parameters = checkpoint.parameters()
        self.state.restore(parameters, optimizer, meta.step, meta.num_tokens, meta.num_skipped)
        self.state.metrics = dict(meta.metrics)
        self.wandb_id = meta.wandb_id or self.wandb_id
        checkpointer.set_aside_after(meta.step)
        print(f"resumed from {checkpoint.folder}, step {meta.step}")
        return checkpoint

    def _open_trackers(self, resumed: bool) -> Trackers:
        """Rank 0 tells people; the console of the others is their log file."""
        total = self.loaded.plan.num_steps
        if self.comm.rank:
            return Trackers([ConsoleTracker(total)] if self.job.log else [])
        log_file = self.config.output_dir / "logs" / "rank-0.log"
        log_file.parent.mkdir(exist_ok=True)
        log = ConsoleTracker(total, log_file.open("a", encoding="utf-8", buffering=1))
        step = self.state.step if resumed else None
        return Trackers([open_tracker(self.config, total, self.wandb_id, step, self.state.metrics), log])

    def _describe(self, state: TrainState) -> CheckpointMeta:
        return CheckpointMeta(
            step=state.step,
            num_tokens=state.num_tokens,
            num_skipped=state.num_skipped,
            run_id=self.job.run_id,
            wandb_id=self.wandb_id,
            facts=self.loaded.facts,
            metrics=state.metrics,
        )

    def _introduce(self) -> None:
        plan, comm = self.loaded.plan, self.comm
        for line in self.loaded.rows.report.lines():
            self.trackers.message(line)
        num_trained = sum(parameter.size for parameter in self.state.parameters.values())
        self.trackers.message(
            f"{self.config.method}: {num_trained:,} parameters trained; {plan.num_steps} steps of "
            f"{plan.global_batch_size} rows in {plan.num_microbatches} micro-batches; {comm.size} workers"
        )

    def _warn(self, state: TrainState, info: StepInfo) -> None:
        if info.skipped:
            self.trackers.message(f"{info.skipped}; the step is skipped")

    def _log(self, state: TrainState, info: StepInfo) -> None:
        self.trackers.log(step_metrics(info), info.step)

    def _generate(self) -> tuple[dict[str, float], list[Sample]]:
        """Exact match of greedy answers to validation prompts, and the answers."""
        rows = self.loaded.rows.validation[: self.config.eval.max_examples]
        samples = evaluate_generation(
            self.state.model, self.loaded.tokenizer, rows, self.config.eval.max_new_tokens, self.comm
        )
        metrics = {"eval/exact_match": sum(sample.exact for sample in samples) / len(samples)}
        self.trackers.log(metrics, self.state.step)
        return metrics, samples

    def _evaluate_at_start(self) -> dict[str, float]:
        """The figures that those at the end are compared with."""
        if not self.config.eval.at_start or self.state.step:
            return {}
        self.evaluate(self.state)
        return self.state.metrics | (self._generate()[0] if self.config.eval.generate else {})

    def _finish(self, before: Mapping[str, float]) -> None:
        after: dict[str, float] = dict(self.state.metrics)
        samples: list[Sample] = []
        if self.config.eval.generate:
            metrics, samples = self._generate()
            after |= metrics
        if self.comm.rank == 0:
            config, loaded = self.config, self.loaded
            final = config.output_dir / "final"
            save_final(
                final, loaded.model, loaded.tokenizer, loaded.architecture,
                source=config.model, method=config.method, lora=config.lora,
            )  # fmt: skip
            for line in [
                *comparison(before, after),
                *sample_lines(samples[: config.eval.num_samples]),
                *next_steps(config, final, loaded.example_prompt),
            ]:
                self.trackers.message(line)
