"""What an update takes of a worker that has a whole copy of the model, and what it keeps from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx

from mlx_distributed.cli.plan.graph import trace
from mlx_distributed.comm.buckets import Arrays, BucketLayout, from_buckets
from mlx_distributed.comm.reduction import slices
from mlx_distributed.config import Config
from mlx_distributed.parallel.adamw import MOMENTS, STEP, decaying
from mlx_distributed.parallel.shard import Shard
from mlx_distributed.train.outer import NUM_TOKENS, make_fragments, momentum_name, names_of, nesterov
from mlx_distributed.train.setup import gradient_layout, make_optimizer

Given = Sequence[Sequence[mx.array]]
_MAX_SIZE = (1 << 31) - 1
"""Elements of an array that MLX can lay out flat."""


@dataclass(frozen=True)
class Update:
    """Of a run without a pipeline."""

    config: Config
    num_parts: int
    """Partial sums of the gradients that a worker hands over in a step."""

    @property
    def num_copies(self) -> float:
        """Of what is trained, in bytes, that are kept beside it: two moments, or a share of them; with
        `parallel.delay_compensation` the parameters of the step before; with `diloco` those agreed on, and momentum."""
        num = 2 * self._share
        if self.config.parallel.sync == "diloco":
            num += 2
        return num + 1 if self._compensated else num

    def num_under_way(self, trained: Arrays) -> float:
        """Sums that travel or have come, in copies as well, while micro-batches are computed."""
        parallel = self.config.parallel
        if parallel.sync == "diloco":
            return self._fragment(trained) if parallel.diloco.overlap_steps else 0.0
        return self.num_parts if parallel.sync == "delayed" else 0

    def peak_bytes(self, trained: Arrays) -> int:
        """The most that is held of what is trained, of what is kept beside it, and of gradients."""
        parallel, size = self.config.parallel, _num_bytes(trained)
        if max((value.size for value in trained.values()), default=0) > _MAX_SIZE:  # There is no graph of that.
            return round((2 + self.num_copies + self.num_under_way(trained)) * size)
        if self.config.optimizer.shard:
            return self._sharded(trained)
        names, moments, layout = [*trained], _moments(trained), gradient_layout(trained)
        flat = parallel.size > 1 and parallel.sync != "diloco" and not self._compensated

        def run(own: Given) -> list[list[mx.array]]:
            sums, state, *values = own
            parameters = dict(zip(names, *values, strict=True)) if values else dict(trained)
            gradients = _named(layout, sums) if flat else dict(zip(names, sums, strict=True))
            groups = self._groups(parameters, gradients, dict(zip(moments, state, strict=True)))
            return [[*parameters, *moments] for parameters, moments in groups]

        sums = [_zeros(bucket.size) for bucket in layout] if flat else _like(trained)
        own = [sums, _like(moments), *([] if self._compensated else [_like(trained)])]
        peak_bytes = _peak(run, own)
        if parallel.sync == "delayed":  # Parts of the next sums wait; the old parameters stay, and those before them.
            return peak_bytes + (self.num_parts + (2 if self._compensated else 0)) * size
        if parallel.sync == "diloco":
            others = 2 + self.num_under_way(trained)
            return max(peak_bytes + round(others * size), 5 * size + self._outer(trained))
        return peak_bytes

    @property
    def _compensated(self) -> bool:
        return self.config.parallel.sync == "delayed" and self.config.parallel.delay_compensation > 0

    @property
    def _share(self) -> float:
        """Of the moments; in an elastic run those of a neighbour are kept too."""
        num = 2 if self.config.elastic.enabled else 1
        return min(1.0, num / self.config.parallel.size) if self.config.optimizer.shard else 1.0

    def _sharded(self, trained: Arrays) -> int:
        """As `sharded.Update` has it: new segments, then all parameters from all workers, then new moments."""
        size, layout = _num_bytes(trained), gradient_layout(trained)
        even = [1 / self.config.parallel.size] * self.config.parallel.size
        shard = Shard.of(layout, [slices(bucket.size, even, index)[0] for index, bucket in enumerate(layout)])
        segments = shard.cut(trained)
        moments, part = _moments(segments), _num_bytes(segments)
        sums = [_zeros(stop - start) for start, stop in shard.slices]

        def exchange(_: Given) -> list[list[mx.array]]:
            groups = self._groups(shard.cut(trained), shard.split(sums), dict(moments))
            return [parameters for parameters, _ in groups]

        def settle(own: Given) -> list[list[mx.array]]:
            state = dict(zip(moments, own[1], strict=True))
            groups = self._groups(shard.cut(trained), shard.split(own[0]), state)
            return [moments for _, moments in groups]

        held = size + round(2 * self._share * size) - 2 * part  # Parameters, and moments of a neighbour.
        exchanged = held + 3 * part + max(_peak(exchange, []), part + size)
        return max(exchanged, held + size + _peak(settle, [sums, _like(moments)]))

    def _groups(
        self, parameters: Arrays, gradients: Arrays, state: Arrays
    ) -> list[tuple[list[mx.array], list[mx.array]]]:
        """New parameters and new moments, group by group."""
        decayed = decaying(parameters)
        state[STEP] = mx.array(0, mx.uint64)
        groups = make_optimizer(self.config).update(parameters, gradients, state, mx.array(1.0), 1.0, decayed)
        return [
            ([*group.values()], [state[f"{name}.{moment}"] for name in group for moment in MOMENTS]) for group in groups
        ]

    def _fragment(self, trained: Arrays) -> float:
        """The largest, as a share of all."""
        return max(_num_bytes(part) for part in self._fragments(trained)) / max(_num_bytes(trained), 1)

    def _fragments(self, trained: Arrays) -> list[Arrays]:
        fragments = make_fragments(trained, self.config)
        return [{name: trained[name] for name in names_of(fragment)} for fragment in fragments]

    def _outer(self, trained: Arrays) -> int:
        """Of the step that `diloco` takes with the sums of a fragment, which stay meanwhile."""
        part = max(self._fragments(trained), key=_num_bytes)
        momentum = {momentum_name(name): value for name, value in part.items()}

        def run(_: Given) -> list[list[mx.array]]:
            moved, kept = nesterov(part, momentum, part | {NUM_TOKENS: mx.array([1], mx.int64)}, 1.0, 1.0)
            return [[*moved.values(), *kept.values()]]

        return _num_bytes(part) + _peak(run, [])


def _peak(run: Callable[[Given], list[list[mx.array]]], own: Given) -> int:
    edges = [0, *accumulate(map(len, own))]
    phases = trace(
        lambda _, *arrays: run([arrays[start:stop] for start, stop in pairwise(edges)]),
        [_zeros(1)],
        own=[array for some in own for array in some],
    )
    return max(phase.peak_bytes for phase in phases)


def _moments(trained: Arrays) -> Arrays:
    return {f"{name}.{moment}": value for name, value in trained.items() for moment in MOMENTS}


def _named(layout: Sequence[BucketLayout], flat: Sequence[mx.array]) -> Arrays:
    return from_buckets(layout, [bucket.split(array) for bucket, array in zip(layout, flat, strict=True)])


def _num_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _like(arrays: Arrays) -> list[mx.array]:
    return [_zeros(*array.shape) for array in arrays.values()]


def _zeros(*shape: int) -> mx.array:
    """That take no memory."""
    return mx.broadcast_to(mx.zeros((), mx.float32), shape)
