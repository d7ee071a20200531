"""What a step is made of: compute, communicate, commit. `trainer`, `delayed` and `diloco` put it together."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distributed.comm.base import Communicator, Parts, add_buckets
from mlx_distributed.comm.buckets import (
    Arrays,
    Bucket,
    BucketLayout,
    from_buckets,
    make_layout,
    to_buckets,
)
from mlx_distributed.comm.tree_sum import Node, TreeSum
from mlx_distributed.config import Config
from mlx_distributed.data.batch import Batch, make_batch
from mlx_distributed.data.stream import AnyPlan, AnyRows
from mlx_distributed.models.packed import packed
from mlx_distributed.parallel.data import rank_weights, share
from mlx_distributed.train import sharded
from mlx_distributed.train.halving import Halving, is_out_of_memory
from mlx_distributed.train.loss import block_sums, global_norm, summed_loss
from mlx_distributed.train.loss_scale import unscaled
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.setup import gradient_layout, make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo
from mlx_distributed.train.tally import Tally


@dataclass(frozen=True)
class Work:
    """Micro-batches whose gradients are summed: those of a step of the plan, or some that follow each other in it."""

    step: int
    """From 0."""
    microbatches: Sequence[tuple[int, ...]]
    """Rows of each."""
    first: int = 0
    """Number in the step of the first of them."""


@dataclass
class Reduced:
    """The sums over all ranks and what follows from them. The same on every rank, but for segments of gradients."""

    gradients: Arrays
    """Whole, or as the segments of this rank; a commit empties it."""
    tally: Tally
    grad_norm: float
    """Of the mean gradient, before clipping."""
    scale: mx.array
    """What a sum of gradients is multiplied by: divides by the label tokens, and clips."""
    skipped: str | None
    """Why the step cannot be taken."""

    def info(
        self, step: int, learning_rate: float, step_s: float, comm_s: float, comm_exposed_s: float, sent_bytes: int
    ) -> StepInfo:
        """What is told of the step; `StepInfo` says what the arguments are."""
        return StepInfo(
            step=step,
            loss=self.tally.mean_loss,
            num_tokens=self.tally.total_tokens,
            learning_rate=learning_rate,
            grad_norm=self.grad_norm,
            step_s=step_s,
            comm_s=comm_s,
            comm_exposed_s=comm_exposed_s,
            sent_bytes=sent_bytes,
            stop_requested=self.tally.stop,
            skipped=self.skipped,
        )


@dataclass
class Sums:
    """What a rank holds of the sums of a step."""

    layout: tuple[BucketLayout, ...]
    """Of the gradients."""
    tally_layout: tuple[BucketLayout, ...]
    trees: list[TreeSum[Bucket]]
    """By bucket of the gradients."""
    tally: Tally

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Of the summation tree, that are held."""
        return tuple(self.trees[0].parts) if self.trees else ()


class Phases:
    """The phases of the steps of a run, on states of one model.

    Args:
        config: of the run.
        plan: the micro-batches of every step.
        rows: training rows that the plan points to.
        stop_requested: asked once per step.
    """

    def __init__(
        self,
        config: Config,
        plan: AnyPlan,
        rows: AnyRows,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.plan, self.rows, self.stop_requested = config, plan, rows, stop_requested
        self.optimizer = make_optimizer(config)
        self.halving = Halving()
        self._gradient_layout: tuple[BucketLayout, ...] | None = None
        self._data_s = 0.0

    @cached_property
    def alone(self) -> Phases:
        """For updates that a rank makes by itself: steps in a group of one, which takes all micro-batches."""
        config = replace(self.config, parallel=replace(self.config.parallel, share="even"))
        alone = Phases(config, self.plan, self.rows)
        alone.halving = self.halving
        return alone

    def work(self, step: int) -> Work:
        """All that is computed in a step."""
        with self._waiting():
            return Work(step, self.plan.microbatches(step))

    def batch(self, work: Work, number: int) -> Batch:
        """A micro-batch of `work`."""
        return self._batch(work.microbatches[number])

    def _batch(self, rows: tuple[int, ...]) -> Batch:
        with self._waiting():
            return make_batch([self.rows[row] for row in rows], self.config)

    def take_data_s(self) -> float:
        """How long this rank has waited for data since it was last asked."""
        waited_s, self._data_s = self._data_s, 0.0
        return waited_s + (self.alone.take_data_s() if "alone" in vars(self) else 0.0)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self._data_s += time.monotonic() - begun_s

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return learning_rate(self.config.scheduler, self.config.optimizer.learning_rate, step, self.plan.num_steps)

    def looked_at(self, step: int) -> bool:
        """Whether the state is saved or evaluated when so many steps have been taken. Nothing may be under way then."""
        every = (self.config.checkpoint.steps, self.config.eval.steps)
        return step == self.plan.num_steps or any(num and step % num == 0 for num in every)

    def begin(self, state: TrainState, work: Work) -> Sums:
        """The sums of a step, of which nothing is computed yet."""
        layout, tally_layout = self._layouts(state, work)
        num = len(work.microbatches)
        tally = Tally.empty(num)
        tally.stop = self.stop_requested()
        return Sums(layout, tally_layout, [TreeSum(num, add_buckets) for _ in layout], tally)

    def compute(self, state: TrainState, work: Work, comm: Communicator) -> Iterator[Parts]:
        """This rank's share of a step, of which nothing is kept; see `add`."""
        num = len(work.microbatches)
        start, stop = share(num, rank_weights(self.config.parallel.share, comm.size))[comm.rank]
        operation = "reduce_scatter" if state.parts else "all_reduce"
        what = f"{operation} of the gradients of step {work.step + 1}"
        leaves = range(start, stop)
        return self.add(state, work, self.begin(state, work), leaves, lambda: comm.check(what), keep=False)

    def add(
        self,
        state: TrainState,
        work: Work,
        sums: Sums,
        leaves: Sequence[int],
        check: Callable[[], None],
        keep: bool,
    ) -> Iterator[Parts]:
        """Compute gradients and tally of some micro-batches and add them to what this rank holds.

        The last micro-batch is evaluated bucket by bucket, from the last layer to the first, so that a bucket is on its
        way while the layers below it are still being computed.

        Where memory runs out, all that this rank holds of the step is let go of and computed anew, in smaller parts;
        what was yielded stays, as it is of the same sums.

        Args:
            state: that gradients are of.
            work: of the step.
            sums: that they are added to.
            leaves: numbers of the micro-batches in `work`.
            check: called after each, to raise where it is not worth going on.
            keep: what is held after it was yielded: who has taken parts needs them no longer than it keeps them.

        Yields:
            By bucket, those of the tally last: all partial sums that this rank holds then.

        Raises:
            TrainingError: memory does not do for a single row.
        """
        held = [leaf for node in sums.nodes for leaf in range(*node)]
        left = list(sums.trees)
        while True:
            try:
                self._add(state, work, sums, left, leaves, check)
                nodes = tuple(left[-1].parts) if left else ()
                yield from self._evaluated(left, keep)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)
            for tree in left:
                tree.parts.clear()
            leaves, held = [*held, *leaves], []
            self.halving.run_out(work.step, reason)
        yield from self._told(sums, nodes)

    def _add(
        self,
        state: TrainState,
        work: Work,
        sums: Sums,
        trees: Sequence[TreeSum[Bucket]],
        leaves: Sequence[int],
        check: Callable[[], None],
    ) -> None:
        """Compute micro-batches and add them to the last ones of the trees; the last micro-batch is not evaluated."""
        layout = sums.layout[len(sums.layout) - len(trees) :]
        for i in leaves:
            loss, gradients, sums.tally.num_tokens[i] = self._whole(state, work, i)
            last = i == leaves[-1]
            for tree, bucket in zip(trees, to_buckets(layout, gradients), strict=True):
                tree.put((i, i + 1), bucket)
            del gradients, bucket
            mx.eval(loss, [] if last else [tree.parts for tree in trees])
            sums.tally.losses[i] = loss.item()
            check()

    def _whole(self, state: TrainState, work: Work, number: int) -> tuple[mx.array, Arrays, int]:
        """Summed loss, its gradient and the label tokens of a micro-batch, computed in as many parts as memory demands;
        the last of them is not evaluated."""
        first, *others = self.halving.parts(work.microbatches[number], self._batch)
        loss, gradients = self.gradients(state, first, work.step, work.first + number)
        for part, batch in enumerate(others, 1):
            mx.eval(loss, gradients)
            more, further = self.gradients(state, batch, work.step, work.first + number, part)
            loss, gradients = loss + more, {name: gradients[name] + further.pop(name) for name in gradients}
        return loss, gradients, sum(batch.num_labels for batch in (first, *others))

    def _held(self, sums: Sums, nodes: Sequence[Node], keep: bool) -> Iterator[Parts]:
        yield from self._evaluated(list(sums.trees), keep)
        yield from self._told(sums, nodes)

    def _evaluated(self, trees: list[TreeSum[Bucket]], keep: bool) -> Iterator[Parts]:
        """What is held of the gradients, tree by tree; each leaves the list."""
        while trees:
            mx.eval(list(trees[0].parts.values()))
            tree = trees.pop(0)
            yield dict(tree.parts)
            if not keep:
                tree.parts.clear()

    def _told(self, sums: Sums, nodes: Sequence[Node]) -> Iterator[Parts]:
        parts = {node: to_buckets(sums.tally_layout, sums.tally.part(node)) for node in nodes}
        for index in range(len(sums.tally_layout)):
            yield {node: buckets[index] for node, buckets in parts.items()}

    def gradients(
        self, state: TrainState, batch: Batch, step: int, index: int, part: int = 0
    ) -> tuple[mx.array, Arrays]:
        """Summed loss and its gradient for one micro-batch, or a part of it; not yet evaluated."""
        mx.random.seed(self.dropout_seed(step, index, part))
        parameters, scale = state.model.trainable_parameters(), state.scale

        def loss_of(values: dict, tokens: mx.array, loss_mask: mx.array) -> tuple[mx.array, mx.array]:
            state.model.update(values)
            loss = summed_loss(state.model, tokens, loss_mask)
            return loss * scale, loss

        try:
            with packed(state.model, batch.groups):
                arrays = mx.array(batch.tokens), mx.array(batch.loss_mask)
                (_, loss), gradients = mx.value_and_grad(loss_of)(parameters, *arrays)
        finally:
            state.model.update(parameters)  # The transformation has left its tracers in the module.
        return loss, unscaled(dict(tree_flatten(gradients)), scale)

    def dropout_seed(self, step: int, index: int, part: int = 0) -> int:
        """Of a micro-batch, whoever computes it, and whatever came before; or of a part of it."""
        key = hashlib.sha256(f"{self.config.seed}/{step}/{index}{f'/{part}' if part else ''}".encode()).digest()
        return int.from_bytes(key[:8], "little")

    def reduce(self, state: TrainState, work: Work, parts: Iterator[Parts], comm: Communicator) -> Reduced:
        """Add up what all ranks have computed. Raises CommError."""
        layout, tally_layout = self._layouts(state, work)
        what, num = f"the gradients of step {work.step + 1}", len(work.microbatches)
        if not state.parts:
            buckets = comm.all_reduce(layout + tally_layout, num, parts, what, state.feedback)
            return self.reduced(state, work, from_buckets(layout + tally_layout, buckets))
        of_gradients = itertools.islice(parts, len(layout))
        slices = comm.reduce_scatter(layout, num, of_gradients, what, state.feedback)
        tally = comm.all_reduce(tally_layout, num, parts, f"the losses of step {work.step + 1}")
        sums = sharded.gather_block_sums(layout, slices, f"the gradient norm of step {work.step + 1}", comm)
        segments = state.parts[0].shard.split(slices)
        return self._reduced(work, segments, Tally.pop(from_buckets(tally_layout, tally)), sums)

    def start(self, state: TrainState, work: Work, parts: Iterator[Parts], comm: Communicator) -> Callable[[], Arrays]:
        """Hand over what this rank has computed; what is returned waits for the sums, the tally among them."""
        layout = sum(self._layouts(state, work), ())
        what = f"the gradients of step {work.step + 1}"
        wait = comm.start_all_reduce(layout, len(work.microbatches), parts, what, state.feedback)
        return lambda: from_buckets(layout, wait())

    def reduced(self, state: TrainState, work: Work, sums: Arrays) -> Reduced:
        """What follows from whole sums, the tally among them."""
        layout, _ = self._layouts(state, work)
        tally = Tally.pop(sums)
        return self._reduced(work, sums, tally, [block_sums(bucket) for bucket in to_buckets(layout, sums)])

    def commit(self, state: TrainState, step: int, reduced: Reduced, comm: Communicator) -> None:
        """Take a step of the plan, or skip it. Touches no other machine, but for a shard, which exchanges its
        parameters before anything changes: a step that fails leaves the old state whole. Raises CommError."""
        rate, num_tokens = self.rate(step), reduced.tally.total_tokens
        if reduced.skipped:
            state.skip(overflow=reduced.tally.first_not_finite() is None)
        elif not state.parts:
            state.commit(self.optimizer, reduced.gradients, reduced.scale, rate, num_tokens)
        else:
            own, update = state.parts[0], self.update(state, step, reduced)
            what = f"the parameters of step {step + 1}"
            parameters = update.exchange(own, reduced.gradients, self.layout(state), what, comm)
            update.settle(own, reduced.gradients)
            sharded.take(state, parameters, num_tokens)

    def update(self, state: TrainState, step: int, reduced: Reduced) -> sharded.Update:
        """Of a shard, what follows from the sums; it can be exchanged and settled by itself."""
        return sharded.Update(self.optimizer, state, reduced.scale, self.rate(step))

    def layout(self, state: TrainState) -> tuple[BucketLayout, ...]:
        """Of the gradients; the same in every step, as names and shapes are."""
        if self._gradient_layout is None:
            self._gradient_layout = gradient_layout(state.parameters, self.config.parallel.wire)
        return self._gradient_layout

    def _layouts(self, state: TrainState, work: Work) -> tuple[tuple[BucketLayout, ...], tuple[BucketLayout, ...]]:
        """Buckets of the gradients and of the tally."""
        return self.layout(state), make_layout(Tally.empty(len(work.microbatches)).part((0, 0)))

    def _reduced(self, work: Work, gradients: Arrays, tally: Tally, sums: Sequence[mx.array]) -> Reduced:
        norm = global_norm(sums) / tally.total_tokens
        clip = mx.minimum(1.0, (self.config.train.max_grad_norm or math.inf) / (norm + 1e-6))
        grad_norm = float(np.asarray(norm))
        skipped = why_not_finite(work.step + 1, tally, grad_norm)
        return Reduced(gradients, tally, grad_norm, clip / tally.total_tokens, skipped)


def why_not_finite(step: int, tally: Tally, grad_norm: float) -> str | None:
    """Why a step cannot be taken, naming the micro-batch where it is known."""
    bad = tally.first_not_finite()
    if bad is not None:
        return f"step {step}: the loss of micro-batch {bad} is {tally.losses[bad]}"
    if not math.isfinite(grad_norm):
        return f"step {step}: the gradient norm is {grad_norm}, though every loss is finite"
    return None
