"""Runs of `parallel.sync: diloco` that take milliseconds, and the same in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from train_samples import CONFIG, TinyModel, make_plan, make_rows, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.config import Config
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.data.batch import collate
from mlx_distributed.parallel.adamw import DistributedAdamW, decaying
from mlx_distributed.parallel.data import rank_weights, share
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train.diloco import MIX, parts_of
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.outer import make_fragments, names_of
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.trainer import Trainer

NUM_STEPS = 11


def loosely(
    *speeds: float, every: int = 4, fragments: int = 1, overlap: int = 0, wire: str = "fp32", look: int | None = None
) -> Config:
    """A run of workers of these speeds; somebody looks at the state after every `look` steps."""
    diloco = DilocoConfig(sync_every=every, fragments=fragments, overlap_steps=overlap)
    parallel = replace(CONFIG.parallel, sync="diloco", share=speeds, nproc=len(speeds), diloco=diloco, wire=wire)  # type: ignore[arg-type]
    return replace(CONFIG, parallel=parallel, checkpoint=replace(CONFIG.checkpoint, steps=look))


def make_state(config: Config, dropout: float = 0.0) -> TrainState:
    mx.random.seed(0)
    state = init_state(TinyModel(dropout), config, LocalComm())
    assert state.inner is not None
    mx.eval(state.parameters, state.optimizer, state.inner.state.optimizer)
    return state


def inner_of(state: TrainState) -> TrainState:
    assert state.inner is not None
    return state.inner.state


def make_trainer(config: Config, stop_requested: Callable[[], bool] = lambda: False) -> Trainer:
    rows = make_rows()
    return Trainer(Phases(config, make_plan(rows, config, NUM_STEPS), rows, stop_requested))


def timeless(info: StepInfo) -> StepInfo:
    return replace(info, step_s=0.0, data_s=0.0, comm_s=0.0, comm_exposed_s=0.0, sent_bytes=0)


def run(state: TrainState, comm: Communicator, config: Config) -> tuple[list[StepInfo], dict[str, str]]:
    infos = [timeless(info) for info in make_trainer(config).steps(state, Mesh(comm))]
    return infos, state.digest()


@dataclass
class Worker:
    """Its own copy, and what it has trained on: in all, and when a fragment last left."""

    parameters: Arrays
    optimizer: Arrays
    num_tokens: int = 0
    exchanged_at: dict[int, int] = field(default_factory=dict)


@dataclass
class Told:
    """Of a step, over all workers."""

    loss: float
    num_tokens: int
    grad_norm: float


class Textbook:
    """All workers in plain loops, one after the other; what they agree on in double precision."""

    def __init__(self, config: Config) -> None:
        self.config, self.model, self.rows = config, TinyModel(), make_rows()
        self.plan, self.optimizer = make_plan(self.rows, config, NUM_STEPS), DistributedAdamW()
        start = make_state(config).parameters
        self.agreed = {name: np.asarray(array, np.float64) for name, array in start.items()}
        self.momentum = {name: np.zeros(array.shape) for name, array in start.items()}
        self.speeds = tuple(rank_weights(config.parallel.share, config.parallel.nproc))
        self.workers = [Worker(dict(start), self.optimizer.init(start)) for _ in self.speeds]
        self.fragments = [names_of(fragment) for fragment in make_fragments(start, config)]
        self.under_way: tuple[int, int, dict[str, np.ndarray]] | None = None
        self.told = [self._step(step) for step in range(NUM_STEPS)]

    def _step(self, step: int) -> Told:
        diloco, told = self.config.parallel.diloco, Told(0.0, 0, 0.0)
        microbatches = self.plan.microbatches(step)
        schedule = parts_of(self.speeds, diloco.sync_every)
        ranges = share(len(microbatches), [1.0] * len(self.workers))
        for worker, parts in zip(self.workers, schedule[step % diloco.sync_every], strict=True):
            for start, stop in (ranges[part] for part in parts):
                if start < stop:
                    self._update(worker, step, microbatches[start:stop], told)
        told.loss /= told.num_tokens
        self._exchange(step + 1)
        return told

    def _update(self, worker: Worker, step: int, microbatches: list[tuple[int, ...]], told: Told) -> None:
        self.model.update(tree_unflatten(list(worker.parameters.items())))
        num_tokens, sums = 0, Arrays()
        for batch in microbatches:
            arrays = collate([self.rows[row] for row in batch])
            loss, found = nn.value_and_grad(self.model, summed_loss)(
                self.model, mx.array(arrays.tokens), mx.array(arrays.loss_mask)
            )
            for name, gradient in dict(tree_flatten(found)).items():
                sums[name] = sums[name] + gradient if name in sums else gradient
            told.loss += float(loss)
            num_tokens += arrays.num_labels
        norm = math.sqrt(sum(float(mx.square(gradient).sum()) for gradient in sums.values())) / num_tokens
        told.grad_norm = max(told.grad_norm, norm)
        told.num_tokens += num_tokens
        worker.num_tokens += num_tokens
        assert self.config.train.max_grad_norm is not None
        scale = mx.array(min(1.0, self.config.train.max_grad_norm / norm) / num_tokens)
        rate = learning_rate(self.config.scheduler, self.config.optimizer.learning_rate, step, NUM_STEPS)
        decayed, old = decaying(worker.parameters), dict(worker.parameters)
        for group in self.optimizer.update(old, sums, worker.optimizer, scale, rate, decayed):
            worker.parameters |= group
        mx.eval(worker.parameters, worker.optimizer)

    def _exchange(self, num_steps: int) -> None:
        diloco, last = self.config.parallel.diloco, num_steps == NUM_STEPS
        rule = diloco.outer_learning_rate, diloco.outer_momentum
        if self.under_way is not None and (last or num_steps == self.under_way[0]):
            self._move(*self.under_way[1:], *rule, mix=0.0 if last else MIX)
            self.under_way = None
        for fragment in range(diloco.fragments):
            first = (fragment + 1) * diloco.sync_every // diloco.fragments
            if num_steps in range(first, NUM_STEPS + 1, diloco.sync_every):
                mean = self._mean_difference(fragment)
                if diloco.overlap_steps and not last:
                    self.under_way = num_steps + diloco.overlap_steps, fragment, mean
                else:
                    self._move(fragment, mean, *rule, mix=0.0)
        if last:
            for fragment in range(diloco.fragments):
                self._move(fragment, self._mean_difference(fragment), 1.0, 0.0, mix=0.0, keep=False)

    def _mean_difference(self, fragment: int) -> dict[str, np.ndarray]:
        since = [worker.num_tokens - worker.exchanged_at.get(fragment, 0) for worker in self.workers]
        mean = {}
        for name in self.fragments[fragment]:
            moved_by = [self.agreed[name] - np.asarray(worker.parameters[name], np.float64) for worker in self.workers]
            mean[name] = np.average(moved_by, axis=0, weights=since if any(since) else None)
        for worker in self.workers:
            worker.exchanged_at[fragment] = worker.num_tokens
        return mean

    def _move(
        self, fragment: int, mean: dict[str, np.ndarray], rate: float, decay: float, *, mix: float, keep: bool = True
    ) -> None:
        for name in self.fragments[fragment]:
            velocity = decay * self.momentum[name] + mean[name]
            if keep:
                self.momentum[name] = velocity
            self.agreed[name] = self.agreed[name] - rate * (mean[name] + decay * velocity)
            for worker in self.workers:
                own = mix * np.asarray(worker.parameters[name], np.float64) + (1 - mix) * self.agreed[name]
                worker.parameters[name] = mx.array(own, mx.float32)


@dataclass
class End:
    """What a rank has at the end."""

    infos: list[StepInfo]
    digest: dict[str, str]
    parameters: dict[str, np.ndarray]
    momentum: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    num_tokens: int


def train(config: Config, dropout: float = 0.0) -> list[End]:
    """A whole run, on as many ranks as it has workers."""
    states = [make_state(config, dropout) for _ in range(config.parallel.nproc)]

    def body(comm: Communicator) -> End:
        state = states[comm.rank]
        infos, digest = run(state, comm, config)
        assert state.pending is None
        parameters, momentum, own = (
            {name: np.array(array) for name, array in arrays.items()}
            for arrays in (state.parameters, state.optimizer, inner_of(state).parameters)
        )
        return End(infos, digest, parameters, momentum, own, state.num_tokens)

    return on_ranks(config.parallel.nproc, body)
