"""What the workers of pipeline.py do, in processes of their own: sleep in place of computing, or train.

`Sleeper` is the interpreter that trains, `train.pipeline.Pipeline`, with its schedules, messages and all that it holds;
only what it would compute is a sleep. A link is a queue with a thread of its own: a message leaves when the one before
it has arrived, and arrives `link_s` later, while both workers go on, as `parallel.simulate` has it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_distributed.cli.load import Loaded, load_all
from mlx_distributed.cli.parts import load_whole
from mlx_distributed.cli.run import choose_device, make_checkpointer
from mlx_distributed.cli.stages import make_mesh
from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config, load_config
from mlx_distributed.models import save_final
from mlx_distributed.models.stages import Stage
from mlx_distributed.parallel.builders import one_f_one_b
from mlx_distributed.parallel.schedule import Action, Kind, Schedule
from mlx_distributed.parallel.simulate import Costs, Span, StageCosts
from mlx_distributed.parallel.validate import lower
from mlx_distributed.train.checkpoint import CheckpointMeta
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.pipeline import Between, Done, Microbatch, Pipeline
from mlx_distributed.train.private import collect, give
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.stage_files import finished, give_finished
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

WHAT = "the benchmark"


Slept = tuple[tuple[Span, ...], int]
"""A step of one worker: its spans by the clock that all processes of the machine share, and the most forward passes
whose input was held at a time, counted by the objects that were alive."""


class Trained(NamedTuple):
    """Some steps of one worker."""

    peak_bytes: int
    """Of MLX's memory, with the model that is ready to train."""
    step_s: list[float]
    processor_s: float
    """That the processor has worked on a step on average."""
    saving_peak_bytes: int
    """Of MLX's memory, while a checkpoint and then `final/` are written."""


class Sleeper(Pipeline):
    """A worker that sleeps for as long as its stages would compute. To be used as a context."""

    def __init__(self, comm: Communicator, schedule: Schedule, costs: Costs) -> None:
        stages = [Stage() for _ in range(schedule.num_stages // comm.size)]
        super().__init__(stages, [Between(1, mx.float32)] * schedule.num_stages, comm)
        self._costs, self._split, self._message = costs, schedule.split_backward, mx.zeros((1, 1, 1))
        mx.eval(self._message)
        self._links: dict[int, ThreadPoolExecutor] = {}
        self._arrived_s: dict[int, float] = {}
        self._sent: list[Future[None]] = []
        self._num_held = 0
        self.in_flight = 0
        self.spans: list[Span] = []

    def __enter__(self) -> Sleeper:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links.values():
            link.shutdown()
        for sent in self._sent:
            sent.result()  # raises what sending has raised

    # What `Pipeline` calls for the actions of a schedule, and when it is done with a micro-batch.

    def _forward(self, stage: int, held: object, batch: Microbatch) -> mx.array | None:
        self._num_held += 1
        self.in_flight = max(self.in_flight, self._num_held)
        weakref.finalize(held, self._let_go)
        self._sleep("F", stage, batch.seed, self._costs.stages[stage].forward_s)
        return None if stage == self._last else self._message

    def _backward(
        self, stage: int, held: object, batch: Microbatch, cotangent: mx.array | None, split: bool
    ) -> mx.array | None:
        costs = self._costs.stages[stage]
        self._sleep("B", stage, batch.seed, costs.backward_s + (0.0 if split else costs.weight_s))
        return None if stage == 0 else self._message

    def _done(self, stage: int, index: int, held: object, last: bool) -> Done:
        if self._split:
            self._sleep("W", stage, index, self._costs.stages[stage].weight_s)
        return Done(index, None, {})

    def _post(self, computed: Action, result: mx.array, peer: int, what: str) -> None:
        peer %= self.comm.size
        pair = sorted((self.comm.rank, peer))
        link_s = self._costs.link_s[pair[0] if pair[1] - pair[0] == 1 else pair[1]]
        if not link_s:
            super()._post(computed, result, peer, what)
            return
        link = self._links.setdefault(peer, ThreadPoolExecutor(1))
        post = super()._post
        self._arrived_s[peer] = max(time.monotonic(), self._arrived_s.get(peer, 0.0)) + link_s
        self._sent.append(link.submit(_at, self._arrived_s[peer], post, computed, result, peer, what))

    def _let_go(self) -> None:
        self._num_held -= 1

    def _sleep(self, kind: Kind, stage: int, index: int, for_s: float) -> None:
        start_s = time.monotonic()
        time.sleep(for_s)
        self.spans.append(Span(Action(kind, stage, index), start_s, time.monotonic()))


def _at(moment_s: float, post: Callable[..., None], *args: object) -> None:
    time.sleep(max(moment_s - time.monotonic(), 0.0))
    post(*args)


def sleep_step(comm: Communicator, schedule: Schedule, costs: Costs) -> Slept:
    """One step, as one worker."""
    nothing = mx.zeros((1, 2), mx.int32)
    batches = [Microbatch(nothing, nothing, index) for index in range(schedule.num_microbatches)]
    with Sleeper(comm, schedule, costs) as worker:
        comm.barrier(WHAT)
        for _ in worker.run(lower(schedule), batches, WHAT):
            pass
    return tuple(worker.spans), worker.in_flight


def sleep_steps(comm: Communicator, cases: Sequence[tuple[Schedule, Costs]], num_rounds: int) -> list[list[Slept]]:
    """Steps of each case, which take turns. To be called through `run_group`."""
    rounds = [[sleep_step(comm, *case) for case in cases] for _ in range(num_rounds)]
    return [list(steps) for steps in zip(*rounds, strict=True)]


def sleep_alone(comm: Communicator, costs: Sequence[StageCosts], num_microbatches: int, num_rounds: int) -> list[Slept]:
    """Steps of the whole model on each worker by itself, at the same time; `costs` are by rank. To be called through
    `run_group`."""
    own, schedule = Costs((costs[comm.rank],), ()), one_f_one_b(1, num_microbatches)
    steps = []
    for _ in range(num_rounds):
        comm.barrier(WHAT)
        steps.append(sleep_step(LocalComm(), schedule, own))
    return steps


def train_steps(comm: Communicator, config_file: Path) -> Trained:
    """Train as `mlx-train` does, without what is around the steps. To be called through `run_group`."""
    config = load_config(config_file)
    choose_device(config.train.device)
    mesh = make_mesh(config, comm, WHAT)
    loaded = load_all(config, comm, mesh.pp if mesh.pp.size > 1 else None)
    state = init_state(loaded.model, config, comm)
    state.num_stages = mesh.pp.size
    mx.eval(state.parameters, state.optimizer)
    phases = Phases if loaded.staged is None else loaded.staged.phases
    trainer = Trainer(phases(config, loaded.plan, loaded.rows.train, lambda: False))
    comm.barrier(WHAT)
    mx.reset_peak_memory()
    begin_s = time.process_time()
    step_s = [info.step_s for info in trainer.steps(state, mesh)]
    processor_s = (time.process_time() - begin_s) / len(step_s)
    peak_bytes = mx.get_peak_memory()
    comm.barrier(WHAT)
    mx.reset_peak_memory()
    save(config, loaded, state, comm)
    saving_peak_bytes = max(mx.get_peak_memory(), mx.get_active_memory())
    comm.barrier(WHAT)
    for group in (mesh.dp, mesh.pp):
        if group is not comm:
            group.close()
    return Trained(peak_bytes, step_s, processor_s, saving_peak_bytes)


def save(config: Config, loaded: Loaded, state: TrainState, comm: Communicator) -> None:
    """A checkpoint and the finished model, as a run writes them."""
    if comm.rank == 0:
        meta = CheckpointMeta(state.step, state.num_tokens, state.num_skipped, WHAT, None, loaded.facts, {})
        make_checkpointer(config).save(state.parameters, state.shared, meta, collect(state, (), comm))
    else:
        give(state, (), comm)
    model, trained = loaded.model, None
    if loaded.staged is not None and comm.rank:
        give_finished(model, loaded.staged.worker_of, comm)
    elif loaded.staged is not None:
        model = load_whole(config, loaded.tokenizer)
        trained = finished(loaded.model, model, loaded.staged.worker_of, comm)
    if comm.rank == 0:
        save_final(
            config.output_dir / "final", model, loaded.tokenizer, loaded.architecture,
            source=config.model, method=config.method, lora=config.lora, trained=trained,
        )  # fmt: skip
