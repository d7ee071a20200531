"""One rank of a training run, from its configuration to `final/`: where all the rooms meet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TextIO

import mlx.core as mx

from mlx_distributed.cli.beside import Beside
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.output_dir import accept_config
from mlx_distributed.cli.stages import named
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.errors import CommError, ConfigError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import ConsoleTracker, Trackers, open_tracker
from mlx_distributed.train import stage_files
from mlx_distributed.train.agreement import synchronise
from mlx_distributed.train.checkpoint import Checkpoint, Checkpointer
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.private import hand_out
from mlx_distributed.train.setup import exchange_layout, init_state
from mlx_distributed.train.state import TrainState
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


def train(job: Job, comm: Communicator, interrupt: Interrupt, mesh: Mesh | None = None) -> int:
    """Train as one rank of a group, then leave it; returns the exit status.

    Args:
        job: what is trained.
        comm: of all ranks.
        interrupt: asks for a stop.
        mesh: the axes, where `comm` is not one of them.
    """
    mesh = mesh or Mesh(dp=comm)
    groups = [comm, *(group for group in (mesh.dp, mesh.pp) if group is not comm)]
    error: BaseException | None = None
    try:
        choose_device(job.config.train.device)
        return _Run(job, comm, mesh, interrupt).train()
    except BaseException as raised:
        error = raised
        raise
    finally:
        for group in groups:
            group.close(error)


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


def restore(state: TrainState, checkpointer: Checkpointer, which: str, facts: Mapping[str, str]) -> Checkpoint | None:
    """Take over what all ranks share of a checkpoint of this run, where there is one.

    Raises:
        CheckpointError, ConfigError: it is not whole, or not of this run.
    """
    checkpoint = checkpointer.find(which)
    if checkpoint is None:
        print("nothing to resume from: starting at the beginning")
        return None
    meta = checkpoint.meta
    meta.check_facts(facts)
    # The moments of a shard are handed out, to this rank too, when all ranks have the rest; of a stage, all of it.
    optimizer = dict(checkpoint.optimizer()) if state.shard is None and state.num_stages == 1 else state.shared
    parameters = state.parameters if state.num_stages > 1 else checkpoint.parameters()
    state.restore(parameters, optimizer, meta.step, meta.num_tokens, meta.num_skipped)
    state.metrics = dict(meta.metrics)
    checkpointer.set_aside_after(meta.step)
    print(f"resumed from {checkpoint.folder}, step {meta.step}")
    return checkpoint


def make_checkpointer(config: Config) -> Checkpointer:
    """Of the output_dir of a run."""
    kept = config.checkpoint
    return Checkpointer(config.output_dir / "checkpoints", kept.save_total_limit, kept.keep_best, print)


def open_trackers(
    config: Config,
    total_steps: int,
    wandb_id: str,
    step: int | None,
    metrics: Collection[str] | None,
    console: TextIO | None = None,
) -> Trackers:
    """Those of rank 0, which tell people, and its log file.

    Args:
        config: of the run.
        total_steps: of the whole run.
        wandb_id: of the run.
        step: the last one that was told of before; None where nothing was.
        metrics: evaluations of it that are known; None: all that were made.
        console: standard output by default.
    """
    log_file = config.output_dir / "logs" / "rank-0.log"
    log_file.parent.mkdir(exist_ok=True)
    log = ConsoleTracker(total_steps, log_file.open("a", encoding="utf-8", buffering=1))
    return Trackers([open_tracker(config, total_steps, wandb_id, step, metrics, console), log])


class _Run:
    """A run put together from its parts. Rank 0 saves, tracks and speaks; the state is the same on every rank."""

    def __init__(self, job: Job, comm: Communicator, mesh: Mesh, interrupt: Interrupt) -> None:
        self.job, self.comm, self.mesh, self.interrupt = job, comm, mesh, interrupt
        config = self.config = job.config
        loaded = load_all(config, comm, mesh.pp if mesh.pp.size > 1 else None)
        self.num_steps = loaded.plan.num_steps
        self.state = init_state(loaded.model, config, comm)
        self.state.num_stages = mesh.pp.size
        checkpointer, checkpoint = make_checkpointer(config), None
        if comm.rank == 0 and job.resume is not None:
            checkpoint = restore(self.state, checkpointer, job.resume, loaded.facts)
        wandb_id = checkpoint.meta.wandb_id if checkpoint else None
        if mesh.pp.size > 1:
            stage_files.hand_out(self.state, checkpoint, comm)
        synchronise(self.state, mesh.dp)
        hand_out(self.state, exchange_layout(self.state.parameters, config), checkpoint, comm)
        if comm.rank == 0:
            accept_config(config)
        self.trackers = self._open_trackers(wandb_id or job.wandb_id, resumed=checkpoint is not None)
        self.beside = Beside(
            config,
            job.run_id,
            wandb_id or job.wandb_id,
            loaded,
            self.state,
            comm,
            checkpointer,
            self.trackers,
            mesh=mesh,
        )
        phases = Phases if loaded.staged is None else loaded.staged.phases
        self.trainer = Trainer(phases(config, loaded.plan, loaded.rows.train, lambda: interrupt.requested))

    def train(self) -> int:
        """Train to the end, or to where somebody wants it to stop; returns the exit status."""
        with self.trackers:
            try:
                self.beside.introduce()
                before = self.beside.at_start()
                self.interrupt.training = True
                if self._loop():
                    self.trackers.message(f"interrupted: step {self.state.step} is saved, --resume goes on from there")
                    self.trackers.finish(INTERRUPTED)
                    return INTERRUPTED
                self.interrupt.training = False
                self.beside.finish(before)
            except BaseException as error:
                for group in (self.comm, self.mesh.dp, self.mesh.pp):
                    group.close(error)  # The peers wait for a word; a tracker may take its time to finish.
                raise
        return 0

    def _loop(self) -> bool:
        """All steps and what happens between them, the last state saved; whether somebody stopped it."""
        stopped = False
        try:
            for info in self.trainer.steps(self.state, self.mesh):
                self.beside.after_step(info)
                stopped = info.stop_requested
            if not stopped and not self.state.metrics:
                self.beside.evaluate(self.state)
        except CommError as error:
            self.job.on_loss()
            if self.comm.rank == 0:
                self.beside.save.alone(self.state)  # The state is that of the last commit, and whole.
            raise named(error, self.comm, self.mesh) from None
        self.beside.save(self.state)
        return stopped

    def _open_trackers(self, wandb_id: str, resumed: bool) -> Trackers:
        """Rank 0 tells people; the console of the others is their log file."""
        if self.comm.rank:
            return Trackers([ConsoleTracker(self.num_steps)] if self.job.log else [])
        step = self.state.step if resumed else None
        return open_trackers(self.config, self.num_steps, wandb_id, step, self.state.metrics)
