"""`Trainer`: the step (compute, communicate, commit) and the loop over steps."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_distributed.comm.base import Communicator, Parts, add_buckets
from mlx_distributed.comm.buckets import (
    Arrays,
    Bucket,
    BucketLayout,
    backward_order,
    from_buckets,
    make_layout,
    to_buckets,
)
from mlx_distributed.comm.tree_sum import TreeSum, cover
from mlx_distributed.config import Config
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.tokenize import Row, collate
from mlx_distributed.errors import TrainingError
from mlx_distributed.parallel.adamw import DistributedAdamW
from mlx_distributed.parallel.data import rank_weights, share
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.parallel.shard import Shard
from mlx_distributed.train import sharded
from mlx_distributed.train.loss import block_sums, global_norm, summed_loss
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.tally import Tally

MAX_SKIPPED = 3
"""So many steps in a row without a finite gradient end the run."""


@dataclass(frozen=True)
class StepInfo:
    """What a step did. Equal on every rank but for the times."""

    step: int
    """Steps committed so far, this one included."""
    loss: float
    """Nats per label token, over all label tokens of the step."""
    num_tokens: int
    """Label tokens of the step, over all workers."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    step_s: float
    comm_s: float
    """From the first gradient that left to the last that came."""
    comm_exposed_s: float
    """Of it, what computation did not hide: what the step waited for."""
    sent_bytes: int
    """By this rank."""
    stop_requested: bool
    """Some rank wants to stop after this step."""
    skipped: str | None = None
    """Why the step left the parameters as they were."""


class Trainer:
    """Runs steps on a state.

    Args:
        config: of the run.
        plan: the micro-batches of every step.
        rows: training rows that the plan points to.
        stop_requested: asked once per step; when any rank says yes, all stop after the same step.
    """

    def __init__(
        self, config: Config, plan: Plan, rows: Sequence[Row], stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.config, self.plan, self.rows = config, plan, rows
        self.optimizer = make_optimizer(config)
        self._stop_requested = stop_requested

    def steps(self, state: TrainState, mesh: Mesh) -> Iterator[StepInfo]:
        """Train to the end of the plan, or until a stop is requested; yields after each commit.

        Raises:
            TrainingError: the loss or the gradient was not finite `MAX_SKIPPED` times in a row.
            CommError: a peer was lost; the state is that of the last commit.
        """
        while state.step < self.plan.num_steps:
            info = self.train_step(state, mesh)
            yield info
            if info.skipped and state.num_skipped >= MAX_SKIPPED:
                raise TrainingError(
                    f"{info.skipped}. That was the {MAX_SKIPPED}rd step in a row: training stops here; "
                    "a lower optimizer.learning_rate or a look at the data of these steps may help"
                )
            if info.stop_requested:
                return

    def train_step(self, state: TrainState, mesh: Mesh) -> StepInfo:
        start_s, step = time.monotonic(), state.step
        microbatches = self.plan.microbatches(step)
        layout = gradient_layout(state.parameters, self.config.parallel.wire)
        tally_layout = make_layout(Tally.empty(len(microbatches)).part((0, 0)))
        # Compute: the partial sums that this rank holds. Communicate: sums, never means; may raise CommError.
        parts = _Stopwatch(self._compute(state, microbatches, layout, tally_layout, mesh))
        before = replace(mesh.dp.traffic)
        gradients, tally, sums = self._reduce(state, layout, tally_layout, len(microbatches), parts, mesh)
        comm_exposed_s = time.monotonic() - start_s - parts.elapsed_s
        reduced = replace(mesh.dp.traffic)
        # Commit: nothing below touches another machine, but for a shard, which exchanges its parameters before anything
        # changes. So a failed step leaves the old state whole.
        norm = global_norm(sums) / tally.total_tokens
        scale = mx.minimum(1.0, (self.config.train.max_grad_norm or math.inf) / (norm + 1e-6)) / tally.total_tokens
        grad_norm = float(np.asarray(norm))
        rate = learning_rate(self.config.scheduler, self.config.optimizer.learning_rate, step, self.plan.num_steps)
        skipped = why_not_finite(step + 1, tally, grad_norm)
        if skipped:
            state.skip()
        elif state.shard is None:
            state.commit(self.optimizer, gradients, scale, rate, tally.total_tokens)
        else:
            sharded.commit(state, self.optimizer, layout, gradients, scale, rate, tally.total_tokens, mesh.dp)
        return StepInfo(
            step=state.step,
            loss=tally.mean_loss,
            num_tokens=tally.total_tokens,
            learning_rate=rate,
            grad_norm=grad_norm,
            step_s=time.monotonic() - start_s,
            comm_s=mesh.dp.traffic.reduce_s - before.reduce_s,
            comm_exposed_s=comm_exposed_s + mesh.dp.traffic.reduce_s - reduced.reduce_s,
            sent_bytes=mesh.dp.traffic.sent_bytes - before.sent_bytes,
            stop_requested=tally.stop,
            skipped=skipped,
        )

    def _reduce(
        self,
        state: TrainState,
        layout: tuple[BucketLayout, ...],
        tally_layout: tuple[BucketLayout, ...],
        num_microbatches: int,
        parts: Iterator[Parts],
        mesh: Mesh,
    ) -> tuple[Arrays, Tally, Sequence[mx.array]]:
        """The summed gradients, whole or as the segments of this rank, the tally, and `block_sums` of all buckets."""
        what = f"the gradients of step {state.step + 1}"
        if state.shard is None:
            buckets = mesh.dp.all_reduce(layout + tally_layout, num_microbatches, parts, what, state.feedback)
            sums = [block_sums(bucket) for bucket in buckets[: len(layout)]]
            gradients = from_buckets(layout + tally_layout, buckets)
            return gradients, Tally.pop(gradients), sums
        of_gradients = itertools.islice(parts, len(layout))
        slices = mesh.dp.reduce_scatter(layout, num_microbatches, of_gradients, what, state.feedback)
        tally = mesh.dp.all_reduce(tally_layout, num_microbatches, parts, f"the losses of step {state.step + 1}")
        sums = sharded.gather_block_sums(layout, slices, f"the gradient norm of step {state.step + 1}", mesh.dp)
        return state.shard.split(slices), Tally.pop(from_buckets(tally_layout, tally)), sums

    def _compute(
        self,
        state: TrainState,
        microbatches: list[tuple[int, ...]],
        layout: Sequence[BucketLayout],
        tally_layout: Sequence[BucketLayout],
        mesh: Mesh,
    ) -> Iterator[Parts]:
        """Gradients and tally of this rank's micro-batches, as the partial sums of each bucket.

        The last micro-batch is evaluated bucket by bucket, from the last layer to the first, so that a bucket is on its
        way while the layers below it are still being computed.
        """
        num = len(microbatches)
        start, stop = share(num, rank_weights(self.config.parallel.share, mesh.dp.size))[mesh.dp.rank]
        trees: list[TreeSum[Bucket]] = [TreeSum(num, add_buckets) for _ in layout]
        tally = Tally.empty(num)
        tally.stop = self._stop_requested()
        for i in range(start, stop):
            tokens, loss_mask = collate([self.rows[row] for row in microbatches[i]])
            tally.num_tokens[i] = loss_mask[:, 1:].sum()
            loss, gradients = self._gradients(state, mx.array(tokens), mx.array(loss_mask), i)
            last = i == stop - 1
            for tree, bucket in zip(trees, to_buckets(layout, gradients), strict=True):
                tree.put((i, i + 1), bucket)
            del gradients, bucket
            mx.eval(loss, [] if last else [tree.parts for tree in trees])
            tally.losses[i] = loss.item()
            operation = "all_reduce" if state.shard is None else "reduce_scatter"
            mesh.dp.check(f"{operation} of the gradients of step {state.step + 1}")
        for tree in trees:
            mx.eval(list(tree.parts.values()))
            yield dict(tree.parts)
            tree.parts.clear()  # Whoever has taken them needs them no longer than it keeps them.
        parts = {node: to_buckets(tally_layout, tally.part(node)) for node in cover(start, stop, num)}
        for index in range(len(tally_layout)):
            yield {node: buckets[index] for node, buckets in parts.items()}

    def _gradients(
        self, state: TrainState, tokens: mx.array, loss_mask: mx.array, index: int
    ) -> tuple[mx.array, Arrays]:
        """Summed loss and its gradient for one micro-batch, not yet evaluated."""
        # Dropout depends on the seed, the step and the micro-batch, not on who computes it or what came before.
        key = hashlib.sha256(f"{self.config.seed}/{state.step}/{index}".encode()).digest()
        mx.random.seed(int.from_bytes(key[:8], "little"))
        parameters = state.model.trainable_parameters()

        def loss_of(values: dict, tokens: mx.array, loss_mask: mx.array) -> mx.array:
            state.model.update(values)
            return summed_loss(state.model, tokens, loss_mask)

        loss, gradients = mx.value_and_grad(loss_of)(parameters, tokens, loss_mask)
        state.model.update(parameters)  # The transformation has left its tracers in the module.
        return loss, dict(tree_flatten(gradients))


def init_state(model: nn.Module, config: Config, comm: Communicator) -> TrainState:
    """The state before the first step: of all moments, or of those that this rank of the group owns."""
    state = TrainState(model, {})
    parameters = state.parameters
    if config.optimizer.shard:
        layout = gradient_layout(parameters, config.parallel.wire)
        state.shard = Shard.of(layout, [owned[comm.rank] for owned in comm.slices(layout)])
        parameters = state.shard.cut(parameters)
    state.optimizer = make_optimizer(config).init(parameters)
    return state


def make_optimizer(config: Config) -> DistributedAdamW:
    """The optimizer that the configuration asks for."""
    return DistributedAdamW(config.optimizer.betas, config.optimizer.eps, config.optimizer.weight_decay)


def gradient_layout(parameters: Arrays, wire: str = "fp32") -> tuple[BucketLayout, ...]:
    """Buckets of the gradients, from the last layer to the first."""
    return make_layout({name: parameters[name] for name in backward_order(list(parameters))}, wire=wire)


def why_not_finite(step: int, tally: Tally, grad_norm: float) -> str | None:
    """Why a step cannot be taken, naming the micro-batch where it is known."""
    bad = tally.first_not_finite()
    if bad is not None:
        return f"step {step}: the loss of micro-batch {bad} is {tally.losses[bad]}"
    if not math.isfinite(grad_norm):
        return f"step {step}: the gradient norm is {grad_norm}, though every loss is finite"
    return None


class _Stopwatch:
    """An iterator that measures the time spent inside it."""

    def __init__(self, inner: Iterator[Parts]) -> None:
        self._inner, self.elapsed_s = inner, 0.0

    def __iter__(self) -> _Stopwatch:
        return self

    def __next__(self) -> Parts:
        start_s = time.monotonic()
        try:
            return next(self._inner)
        finally:
            self.elapsed_s += time.monotonic() - start_s
