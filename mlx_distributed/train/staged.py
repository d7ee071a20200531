"""The step on one worker of a pipeline: the phases of any other step, on the part of the model that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distributed.comm.base import Parts
from mlx_distributed.comm.buckets import Arrays, BucketLayout, to_buckets
from mlx_distributed.comm.tree_sum import Node, cover
from mlx_distributed.config import Config
from mlx_distributed.data.stream import AnyPlan, AnyRows
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.train.phases import Phases, Reduced, Sums, Work
from mlx_distributed.train.pipeline import Microbatch, Pipeline
from mlx_distributed.train.stage_norm import StageNorm
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.tally import Tally

_TAG = 3


class Chunks(nn.Module):
    """Several stages of one model as one module, whose arrays have the names that they have in the whole model."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self._stages = tuple(stages)

    def parameters(self) -> dict:
        return _joined(stage.parameters() for stage in self._stages)

    def trainable_parameters(self) -> dict:
        return _joined(stage.trainable_parameters() for stage in self._stages)

    def update(self, parameters: dict, strict: bool = True) -> Chunks:  # type: ignore[override]  # as MLX has it
        given = _flat(parameters)
        for stage in self._stages:
            own = [(name, given[name]) for name in _flat(stage.parameters()) if name in given]
            stage.update(tree_unflatten(own), strict)
        return self

    def train(self, mode: bool = True) -> Chunks:
        for stage in self._stages:
            stage.train(mode)
        return self


def _joined(trees: Iterable[dict]) -> dict:
    joined: Arrays = {}
    for tree in trees:
        joined |= _flat(tree)
    return tree_unflatten(list(joined.items()))


def _flat(tree: dict) -> Arrays:
    flat: Arrays = dict(tree_flatten(tree))
    return flat


class StagePhases(Phases):
    """The phases of the steps of a run, on one worker of a pipeline.

    Args:
        config, plan, rows, stop_requested: as of `Phases`.
        pipeline: that this worker is a part of.
        schedule: makes the one for so many micro-batches.
        layout: of the gradients of the whole model.
        worker_of: by name of a parameter, the worker of the pipeline that counts it.
        tied: name of what the first and the last worker both hold, if anything.
    """

    def __init__(
        self,
        config: Config,
        plan: AnyPlan,
        rows: AnyRows,
        stop_requested: Callable[[], bool],
        pipeline: Pipeline,
        schedule: Callable[[int], Schedule],
        layout: Sequence[BucketLayout],
        worker_of: Mapping[str, int],
        tied: str | None,
    ) -> None:
        super().__init__(config, plan, rows, stop_requested)
        self.pipeline, self._schedule, self._tied = pipeline, lru_cache(maxsize=8)(schedule), tied
        self._norm = StageNorm(layout, worker_of)

    def add(
        self,
        state: TrainState,
        work: Work,
        sums: Sums,
        leaves: Sequence[int],
        check: Callable[[], None],
        keep: bool,
    ) -> Iterator[Parts]:
        """See `Phases.add`; all workers of the pipeline are given the same micro-batches."""
        batches = []
        for i in leaves:
            batch = self.batch(work, i)
            sums.tally.num_tokens[i] = batch.num_labels
            seed = self.dropout_seed(work.step, work.first + i)
            arrays = mx.array(batch.tokens), mx.array(batch.loss_mask)
            batches.append(Microbatch(*arrays, seed, batch.groups, state.scale))
        gradients: dict[int, Arrays] = {}
        num_left = dict.fromkeys(range(len(batches)), len(self.pipeline.stages))
        for done in (
            self.pipeline.run(self._schedule(len(batches)), batches, f"step {work.step + 1}") if batches else ()
        ):
            i = leaves[done.microbatch]
            if done.loss is not None:
                sums.tally.losses[i] = done.loss
            mine = gradients.setdefault(i, {})
            for name, gradient in done.gradients.items():  # What is tied may be in two stages of one worker.
                mine[name] = mine[name] + gradient if name in mine else gradient
            num_left[done.microbatch] -= 1
            if not num_left[done.microbatch]:
                for tree, bucket in zip(sums.trees, to_buckets(sums.layout, gradients.pop(i)), strict=True):
                    tree.put((i, i + 1), bucket)
                if any(num_left.values()):
                    mx.eval([tree.parts for tree in sums.trees])
            check()
        nodes: Sequence[Node] = sums.nodes
        if not sums.trees and leaves:  # Nothing is trained here.
            nodes = cover(leaves[0], leaves[-1] + 1, len(work.microbatches))
        yield from self._held(sums, nodes, keep)

    def reduced(self, state: TrainState, work: Work, sums: Arrays) -> Reduced:
        """What follows from the sums of this worker's part and of the others'. Raises CommError."""
        what, comm = f"the gradient norm of step {work.step + 1}", self.pipeline.comm
        tally = Tally.pop(sums)
        self.pipeline.tell(tally, f"the losses of step {work.step + 1}")
        if self._tied is not None and self._tied in sums and comm.size > 1:
            sums[self._tied] = self._both(sums[self._tied], what)
        return self._reduced(work, sums, tally, self._norm.gather(sums, comm.rank, what, comm))

    def _both(self, mine: mx.array, what: str) -> mx.array:
        """The gradient of what the first and the last worker hold, added up in the same order on both."""
        comm = self.pipeline.comm
        first = comm.rank == 0
        other = comm.size - 1 if first else 0
        mx.eval(mine)
        comm.send(mine, other, _TAG, what)
        theirs = comm.recv(other, _TAG, what)
        if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            reason = f"sent {theirs.dtype}{tuple(theirs.shape)} for {self._tied}"
            raise CommError(f"recv of {what}", other, comm.generation, 0.0, reason)
        return mine + theirs if first else theirs + mine
