"""`Pipeline`: one worker of a pipeline. It runs any `parallel.schedule.Schedule` over the stages that it holds.

Activations go to the next stage and cotangents back to the one before. Every form of the backward pass here gives the
bits that the whole model gives, so a schedule decides when something is computed, and never what comes out.

Shapes: B rows, L tokens that go in, D width of the hidden state.

Source:
    the interpreter of PyTorch's torch.distributed.pipelining; the split of the backward pass from Qi et al. 2023,
    "Zero Bubble Pipeline Parallelism".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import CommError
from mlx_distributed.models import trainable
from mlx_distributed.models.packed import packed
from mlx_distributed.models.stages import Stage
from mlx_distributed.parallel.schedule import Action, Kind, Schedule
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.loss_scale import unscaled
from mlx_distributed.train.rounding import on_wire, restored, rounded
from mlx_distributed.train.tally import Tally

_COMPUTED: dict[Kind, Kind] = {"RECV_F": "F", "SEND_F": "F", "RECV_B": "B", "SEND_B": "B"}
"""What takes or makes a message."""
_TAGS: dict[Kind, int] = {"F": 1 << 8, "B": 1 << 9}
"""Messages of one tag come in the order of sending."""


class Microbatch(NamedTuple):
    """What a pipeline computes at a time."""

    tokens: mx.array
    """int32 [B, L + 1]."""
    loss_mask: mx.array
    """bool [B, L + 1]."""
    seed: int
    """Of dropout."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Of packed rows, see `data.batch.Batch`."""
    scale: float = 1.0
    """What the loss is multiplied by before it is differentiated."""


class Done(NamedTuple):
    """What a worker has when it is done with a micro-batch in one of its stages."""

    microbatch: int
    loss: float | None
    """Summed over its label tokens; in the last stage alone."""
    gradients: Arrays
    """Of what is trained in the stage; evaluated, but for those that a worker computes last."""


class Between(NamedTuple):
    """What goes into a stage, but for the first."""

    width: int
    """D."""
    dtype: mx.Dtype


class _Graph(NamedTuple):
    """A micro-batch in a stage, forwards and backwards; nothing is evaluated yet."""

    result: mx.array
    """Hidden state, or in the last stage the summed loss."""
    cotangent: mx.array
    of_input: mx.array | None
    """Gradient; None in the first stage."""
    gradients: Arrays


@dataclass
class _Held:
    """What is held of a micro-batch in a stage between its passes."""

    incoming: mx.array | None = None
    graph: _Graph | None = None


class Pipeline:
    """The part of a pipeline that one worker computes.

    Args:
        stages: that it holds, chunk by chunk; those of the whole model go round over the ranks of `comm`.
        inputs: of every stage of the whole model.
        comm: of the workers of the pipeline, in the order of their stages.
        keep: hold what a forward pass has computed until the backward pass, which takes memory for every micro-batch in
            flight; else hold its input alone and compute anew.
        wire_dtype: of what travels between workers in a step, see `train.rounding`; None sends it as it is.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        inputs: Sequence[Between],
        comm: Communicator,
        keep: bool = False,
        wire_dtype: mx.Dtype | None = None,
    ) -> None:
        self.stages = {chunk * comm.size + comm.rank: stage for chunk, stage in enumerate(stages)}
        self.comm = comm
        self._inputs, self._keep, self._wire_dtype = inputs, keep, wire_dtype

    def run(self, schedule: Schedule, microbatches: Sequence[Microbatch], what: str) -> Iterator[Done]:
        """Forward and backward passes of some micro-batches; yields what is done, in the order of the schedule.

        Args:
            schedule: `lower`ed, for as many micro-batches.
            microbatches: the same on all workers.
            what: they are of, in words.

        Raises:
            CommError: a worker of the pipeline is lost, or sent something else than what was due.
        """
        given: dict[Action, mx.array] = {}  # To an F its hidden state, to a B its cotangent.
        made: dict[Action, mx.array] = {}  # By an F or a B, for another worker.
        held: dict[tuple[int, int], _Held] = {}
        actions = schedule.actions[self.comm.rank]
        for action in actions:
            self.comm.check(what)
            kind, stage, index = action
            batch = microbatches[index]
            if kind in _COMPUTED:
                computed = action._replace(kind=_COMPUTED[kind])
                if computed in made:
                    self._send(computed, made.pop(computed), schedule, what)
                else:
                    given[computed] = self._receive(computed, batch, schedule, what)
                continue
            result = None
            with packed(self.stages[stage], batch.groups):
                if kind == "F":
                    held[stage, index] = _Held(given.pop(action, None))
                    result = self._forward(stage, held[stage, index], batch)
                elif kind == "B":
                    cotangent = given.pop(action, None)
                    result = self._backward(stage, held[stage, index], batch, cotangent, schedule.split_backward)
            if result is not None and (target := schedule.target(action)) is not None:
                if schedule.worker_of(target.stage) == self.comm.rank:
                    given[target] = result
                else:
                    made[action] = result
            if kind == schedule.kinds[-1]:
                yield self._done(stage, index, held.pop((stage, index)), last=action is actions[-1])

    def tell(self, tally: Tally, what: str) -> None:
        """Let all workers have the losses that the last one knows, and hear of a stop that any of them wants."""
        mine = mx.array([*tally.losses.tolist(), float(tally.stop)], mx.float32)
        gathered = [np.asarray(array) for array in self.comm.all_gather(mine, what)]
        for peer, array in enumerate(gathered):
            if array.shape != (len(tally.losses) + 1,) or array.dtype != np.float32:
                reason = f"sent {array.dtype}{array.shape} where {len(tally.losses)} losses were due"
                raise CommError(f"all_gather of {what}", peer, self.comm.generation, 0.0, reason)
        tally.losses[:] = gathered[-1][:-1]
        tally.stop = any(array[-1] != 0.0 for array in gathered)

    def losses(self, microbatches: Sequence[Microbatch], what: str) -> Iterator[float]:
        """Forward passes alone: the summed loss of each micro-batch on the worker of the last stage, 0 elsewhere.
        Raises CommError."""
        for batch in microbatches:
            loss = self.through(partial(self._result, batch=batch), _shape(batch), what)
            yield 0.0 if loss is None else float(np.asarray(loss))

    def through(
        self, apply: Callable[[int, mx.array | None], mx.array], shape: tuple[int, int], what: str
    ) -> mx.array | None:
        """One pass through all stages, with hidden states as they are on the wire.

        Args:
            apply: number of a stage and the hidden state that goes into it, None for the first -> what comes out.
            shape: B, L.
            what: is passed on, in words.

        Returns:
            What comes out of the last stage, not evaluated; None on the workers that do not hold it.

        Raises:
            CommError: as of `run`.
        """
        result: mx.array | None = None
        for stage in self.stages:
            self.comm.check(what)
            action = Action("F", stage, 0)
            if stage and self.comm.size > 1:
                result = self._expect(action, self.comm.rank - 1, (*shape, self._inputs[stage].width), None, what)
            result = apply(stage, result)
            if stage < self._last and self.comm.size > 1:
                self._post(action, result, self.comm.rank + 1, what)
        return result if self._last in self.stages else None

    @property
    def _last(self) -> int:
        return len(self._inputs) - 1

    def _forward(self, stage: int, held: _Held, batch: Microbatch) -> mx.array | None:
        """Hidden state, evaluated; None from the last stage, whose loss is computed in its backward pass."""
        if self._keep:
            held.graph = self._graph(stage, held.incoming, batch)
            mx.eval(held.graph.result)
            return held.graph.result
        if stage == self._last:
            return None
        hidden = self._result(stage, held.incoming, batch)
        mx.eval(hidden)
        return hidden

    def _backward(
        self, stage: int, held: _Held, batch: Microbatch, cotangent: mx.array | None, split: bool
    ) -> mx.array | None:
        """Gradient of what went in, evaluated; None in the first stage. Unless the backward pass is split, those of the
        weights are too: together they let go of a layer when they are through with it."""
        if held.graph is None:
            held.graph = self._graph(stage, held.incoming, batch, cotangent)
        elif cotangent is not None:
            # The graph has been built with a cotangent that nothing has looked at yet: it reads what stands there now.
            memoryview(held.graph.cotangent).cast("B")[:] = memoryview(_bytes(cotangent))  # type: ignore[arg-type]
        held.incoming = None
        of_input = held.graph.of_input
        if of_input is not None:
            mx.eval(of_input, {} if split else held.graph.gradients)
        return of_input

    def _done(self, stage: int, index: int, held: _Held, last: bool) -> Done:
        graph = held.graph
        assert graph is not None
        if not last:  # Of the last ones, some can be on their way to the other copies while others are computed.
            mx.eval(graph.result, graph.gradients)
        loss = float(np.asarray(graph.result)) if stage == self._last else None
        return Done(index, loss, graph.gradients)

    def _graph(
        self, stage: int, incoming: mx.array | None, batch: Microbatch, cotangent: mx.array | None = None
    ) -> _Graph:
        """Forward and backward pass, not evaluated; without a cotangent, with one that is yet to be written."""
        model = self.stages[stage]
        parameters = trainable(model)
        names, values = list(parameters), list(parameters.values())
        if stage == self._last:
            cotangent = mx.array(batch.scale)
        elif cotangent is None:
            width, dtype = self._inputs[stage + 1]
            cotangent = mx.zeros((*_shape(batch), width), dtype)
            mx.eval(cotangent)

        def apply(*primals: mx.array) -> list[mx.array]:
            model.update(tree_unflatten(list(zip(names, primals, strict=False))))
            return [self._result(stage, primals[-1] if incoming is not None else None, batch)]

        primals = values if incoming is None else [*values, incoming]
        if not primals:  # Nothing is trained here, nor before.
            return _Graph(self._result(stage, None, batch), cotangent, None, {})
        (result,), gradients = mx.vjp(apply, primals, [cotangent])
        model.update(tree_unflatten(list(parameters.items())))  # The transformation has left its tracers there.
        of_input = None if incoming is None else gradients[-1]
        of_weights = unscaled(dict(zip(names, gradients, strict=False)), batch.scale)
        return _Graph(result, cotangent, of_input, of_weights)

    def _result(self, stage: int, incoming: mx.array | None, batch: Microbatch) -> mx.array:
        """Of a stage: hidden state, or the summed loss; not evaluated."""
        model = self.stages[stage]
        mx.random.seed(batch.seed)
        inputs = batch.tokens[:, :-1] if incoming is None else incoming
        if stage < self._last:
            return model(inputs)
        return summed_loss(lambda _: model(inputs), batch.tokens, batch.loss_mask)

    def _send(self, computed: Action, result: mx.array, schedule: Schedule, what: str) -> None:
        target = schedule.target(computed)
        assert target is not None
        if self._wire_dtype is not None:
            result = rounded(result, self._wire_dtype)
        self._post(computed, result, schedule.worker_of(target.stage), what)

    def _receive(self, computing: Action, batch: Microbatch, schedule: Schedule, what: str) -> mx.array:
        source = schedule.source(computing)
        assert source is not None
        shape = (*_shape(batch), self._between(computing).width)
        wire = self._expect(computing, schedule.worker_of(source.stage), shape, self._wire_dtype, what)
        return restored(wire, shape, self._between(computing).dtype)

    def _post(self, computed: Action, result: mx.array, peer: int, what: str) -> None:
        mx.eval(result)
        self.comm.send(result, peer % self.comm.size, _TAGS[computed.kind], what)

    def _expect(
        self, computing: Action, peer: int, shape: tuple[int, ...], wire_dtype: mx.Dtype | None, what: str
    ) -> mx.array:
        """What an F or a B takes, as it travels."""
        peer %= self.comm.size
        array = self.comm.recv(peer, _TAGS[computing.kind], what)
        due, dtype = on_wire(shape, wire_dtype or self._between(computing).dtype)
        if array.shape != due or array.dtype != dtype:
            reason = f"sent {array.dtype}{tuple(array.shape)} for {computing}, where {dtype}{due} was due"
            raise CommError(f"recv of {what}", peer, self.comm.generation, 0.0, reason)
        return array

    def _between(self, computing: Action) -> Between:
        """Of what an F or a B takes."""
        return self._inputs[computing.stage + (computing.kind == "B")]


def _shape(batch: Microbatch) -> tuple[int, int]:
    """B, L."""
    rows, length = batch.tokens.shape
    return rows, length - 1


def _bytes(array: mx.array) -> np.ndarray:
    return np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8))
