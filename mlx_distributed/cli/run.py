"""One rank of a training run, from its configuration to `final/`: where all the rooms meet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import mlx.core as mx

from mlx_distributed.cli.beside import Beside
from mlx_distributed.cli.elastic.crew import hostname
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.load import Loaded, load_all
from mlx_distributed.cli.output_dir import accept_config
from mlx_distributed.cli.report import describe_data
from mlx_distributed.cli.stages import named
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.errors import CommError, ConfigError, StreamError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import ConsoleTracker, Trackers, open_tracker, open_worker_tracker
from mlx_distributed.train import stage_files
from mlx_distributed.train.agreement import broadcast_bytes, synchronise
from mlx_distributed.train.best import from_lines
from mlx_distributed.train.checkpoint import Checkpoint, Checkpointer
from mlx_distributed.train.halving import Halving, explained
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
    on_saving: Callable[[], None] = lambda: None
    """Called before the last state is saved, which may take a while, and for which not all ranks stay."""
    halvings: int = 0
    """As of `train.halving`, for an elastic worker that was started again."""


def train(job: Job, comm: Communicator, interrupt: Interrupt, mesh: Mesh | None = None) -> int:
    """Train as one rank of a group, then leave it; returns the exit status.

    Args:
        job: what is trained.
        comm: of all ranks.
        interrupt: asks for a stop.
        mesh: the axes, where `comm` is not one of them.
    """
    mesh = mesh or Mesh(dp=comm)
    with leaving(comm, mesh), explained():
        choose_device(job.config.train.device)
        try:
            run = _Run(job, comm, mesh, interrupt)
        except CommError as lost:
            raise named(lost, comm, mesh) from None
        return run.train()


@contextmanager
def leaving(comm: Communicator, mesh: Mesh) -> Iterator[None]:
    """At the end, leave the group of all ranks and those of the axes; the peers are told of an error."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        for group in [comm, *(group for group in (mesh.dp, mesh.pp) if group is not comm)]:
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
    """As `load_state`, to go on from there: checkpoints of later steps are set aside, and people are told."""
    checkpoint = load_state(state, checkpointer, which, facts)
    if checkpoint is None:
        print("nothing to resume from: starting at the beginning")
    else:
        checkpointer.set_aside_after(state.step)
        print(f"resumed from {checkpoint.folder}, step {state.step}")
    return checkpoint


def load_state(
    state: TrainState, checkpointer: Checkpointer, which: str, facts: Mapping[str, str]
) -> Checkpoint | None:
    """Take over what all ranks share of a checkpoint of this run, where there is one; no moments where the state is
    made without.

    Raises:
        CheckpointError, ConfigError: it is not whole, or not of this run.
    """
    checkpoint = checkpointer.find(which)
    if checkpoint is None:
        return None
    meta = checkpoint.meta
    meta.check_facts(facts)
    # Parts of the moments are handed out, to this rank too, when all ranks have the rest; of a stage, all of it.
    replicated = not state.parts and state.num_stages == 1 and bool(state.optimizer)
    optimizer = dict(checkpoint.optimizer()) if replicated else state.shared
    parameters = state.parameters if state.num_stages > 1 else checkpoint.parameters()
    state.restore(parameters, optimizer, meta.step, meta.num_tokens, meta.num_skipped)
    state.metrics = dict(meta.metrics)
    state.evaluations = from_lines(checkpointer.metric, meta.evaluations)
    return checkpoint


def make_checkpointer(config: Config) -> Checkpointer:
    """Of the output_dir of a run."""
    kept = config.checkpoint
    folder = config.output_dir / "checkpoints"
    return Checkpointer(folder, kept.save_total_limit, kept.keep_best, print, kept.metric_for_best)


def open_trackers(
    config: Config,
    loaded: Loaded,
    wandb_id: str,
    step: int | None,
    metrics: Collection[str] | None,
    console: TextIO | None = None,
) -> Trackers:
    """Those of rank 0, which tell people, and its log file.

    Args:
        config: of the run.
        loaded: what is trained.
        wandb_id: of the run.
        step: the last one that was told of before; None where nothing was.
        metrics: evaluations of it that are known; None: all that were made.
        console: standard output by default.
    """
    log_file = config.output_dir / "logs" / "rank-0.log"
    log_file.parent.mkdir(exist_ok=True)
    total_steps = loaded.plan.num_steps
    log = ConsoleTracker(total_steps, log_file.open("a", encoding="utf-8", buffering=1))
    trackers = Trackers([open_tracker(config, total_steps, wandb_id, step, metrics, console), log])
    trackers.inputs(describe_data(config, loaded))
    return trackers


class _Run:
    """A run put together from its parts. Rank 0 saves, tracks and speaks; the state is the same on every rank."""

    def __init__(self, job: Job, comm: Communicator, mesh: Mesh, interrupt: Interrupt) -> None:
        self.job, self.comm, self.mesh, self.interrupt = job, comm, mesh, interrupt
        config = self.config = job.config
        loaded = load_all(config, comm, mesh.pp if mesh.pp.size > 1 else None, mesh.machines)
        self.loaded = loaded
        self.state = init_state(loaded.model, config, comm)
        self.state.num_stages = mesh.pp.size
        checkpointer, checkpoint = make_checkpointer(config), None
        if comm.rank == 0 and job.resume is not None:
            checkpoint = restore(self.state, checkpointer, job.resume, loaded.facts)
        # With the checkpoint of another folder, rank 0 alone knows it.
        wandb_id = (checkpoint.meta.wandb_id if checkpoint else None) or job.wandb_id
        wandb_id = broadcast_bytes(wandb_id.encode(), comm, "the W&B run").decode()
        if mesh.pp.size > 1:
            stage_files.hand_out(self.state, checkpoint, comm)
        synchronise(self.state, mesh.dp)
        hand_out(self.state, exchange_layout(self.state.parameters, config), checkpoint, comm)
        if comm.rank == 0:
            accept_config(config)
        self.trackers = self._open_trackers(wandb_id, resumed=checkpoint is not None)
        self.beside = Beside(
            config,
            job.run_id,
            wandb_id,
            loaded,
            self.state,
            comm,
            checkpointer,
            self.trackers,
            mesh=mesh,
        )
        phases = Phases if loaded.staged is None else loaded.staged.phases
        self.trainer = Trainer(phases(config, loaded.plan, loaded.train, lambda: interrupt.requested))
        self.trainer.phases.halving = Halving(lambda line: self.trackers.message(f"worker {comm.rank}: {line}"))

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
            steps = self.trainer.steps(self.state, self.mesh)
            while not self.beside.stops_early and (info := next(steps, None)) is not None:
                self.beside.after_step(info)
                stopped = info.stop_requested
            if not stopped:
                self.beside.evaluate_last()
        except (CommError, StreamError) as error:
            self.job.on_saving()
            if self.comm.rank == 0:
                self.beside.save.alone(self.state)  # The state is that of the last commit, and whole.
            if isinstance(error, StreamError):
                raise
            raise named(error, self.comm, self.mesh) from None
        self.job.on_saving()
        self.beside.save(self.state)
        return stopped

    def _open_trackers(self, wandb_id: str, resumed: bool) -> Trackers:
        """Rank 0 tells people; the console of the others is their log file."""
        if self.comm.rank:
            worker = f"rank-{self.comm.rank}-{hostname()}"
            return open_worker_tracker(self.config, self.loaded.plan.num_steps, wandb_id, worker, self.job.log)
        step = self.state.step if resumed else None
        return open_trackers(self.config, self.loaded, wandb_id, step, self.state.metrics)
