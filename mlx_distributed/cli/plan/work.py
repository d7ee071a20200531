"""What a stage of a model takes, from the graphs that `train.pipeline` would evaluate for a micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_distributed.cli.plan.graph import Phase, trace
from mlx_distributed.comm.buckets import Arrays, to_buckets
from mlx_distributed.models import trainable
from mlx_distributed.models.costs import Cost, costs
from mlx_distributed.models.outline import describe
from mlx_distributed.models.packed import isolate, packed
from mlx_distributed.models.stages import Stage, cut, pass_by
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.outer import twin
from mlx_distributed.train.setup import gradient_layout

Order = Literal["stage", "buckets", "bucket by bucket"]


@dataclass(frozen=True)
class StageWork:
    """Of one stage and one micro-batch, the longest one."""

    forward_flops: float
    backward_flops: float
    """Of the gradient of the input, with what is computed again for it."""
    weight_flops: float
    held_bytes: int
    """From the forward pass to the backward pass."""
    residual_bytes: int
    """Between the two parts of a backward pass that is split."""
    working_bytes: int
    """The most that is held meanwhile for the micro-batch that is computed, beside `held_bytes`; of a model in one
    piece, with the sums of gradients that are held then."""

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops + self.weight_flops

    def working(self, split_backward: bool) -> int:
        """`working_bytes` beside what `simulate` counts."""
        return max(self.working_bytes - self.residual_bytes, 0) if split_backward else self.working_bytes


class Sums(NamedTuple):
    """Sums of gradients that a worker holds when it computes a micro-batch."""

    num_held: int = 0
    num_added: int = 0
    """To which the gradient is added, so that they are freed."""


NO_SUMS = Sums()
_MIXTURES = (0.0, 0.5, 1.0)
"""Of tokens with scores of attention."""


@dataclass(frozen=True)
class Shape:
    """Of micro-batches, B rows of L tokens that go in, and of how they are computed. Packed rows count as one."""

    num_rows: int
    length: int
    keep: bool
    """As `parallel.pipeline.activations`."""
    checkpointed: bool
    """As `train.gradient_checkpointing`."""
    order: Order = "stage"
    """In which gradients are evaluated: as in a stage of a pipeline, by name; as in `train.phases`, from the last layer
    to the first; or, of the last micro-batch of a worker in a step, after the loss and bucket by bucket."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """As those of `Batch`: lengths of packed rows."""
    sums: Sums = NO_SUMS
    """Of a model in one piece."""

    @property
    def num_tokens(self) -> int:
        """Padding too."""
        return self.num_rows * self.length

    @property
    def num_scores(self) -> int:
        """Of attention, by head: a square for every row."""
        grids = [(self.num_rows, self.length)] if self.groups is None else [(len(own), max(own)) for own in self.groups]
        return sum(num_rows * length**2 for num_rows, length in grids)


def largest(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Those that may take the most memory, the one with the most tokens first. Memory grows with tokens and with the
    scores of attention, so it is one that has the most of some mixture of both. None of none."""
    if not shapes:
        return ()
    tokens, scores = max(shape.num_tokens for shape in shapes), max(shape.num_scores for shape in shapes)
    found = [
        max(shapes, key=lambda shape: (1 - weight) * shape.num_tokens / tokens + weight * shape.num_scores / scores)
        for weight in _MIXTURES
    ]
    return tuple(dict.fromkeys(found))


class Model:
    """A model that can be cut in any way, as nothing of it is read: zeros that take no memory stand for its weights.

    Args:
        model: prepared for training, lazily; is changed.

    Raises:
        ConfigError: it cannot be cut into stages.
    """

    def __init__(self, model: nn.Module) -> None:
        model.update(tree_map(lambda array: zeros(array.shape, array.dtype), model.parameters()))
        self._model, self.costs, self.outline = model, costs(model), describe(model)
        self.work = lru_cache(maxsize=None)(self._work)

    @property
    def num_layers(self) -> int:
        return self.outline.num_layers

    @cached_property
    def trained(self) -> Arrays:
        """Zeros in place of what is trained."""
        return trainable(self._model)

    def stage(self) -> Stage:
        """All of it in one piece, another one at every call."""
        return cut(twin(self._model), 0, self.num_layers)

    @property
    def cost(self) -> Cost:
        """Of all of it."""
        return self.costs.stage(0, self.num_layers)

    def input_bytes(self, start: int, shape: Shape) -> int:
        """Of the hidden state [B, L, D] that enters a layer."""
        return shape.num_rows * shape.length * self.outline.width * self.outline.dtypes[start].size

    def _work(self, start: int, stop: int, shape: Shape) -> StageWork:
        """Of the stage of layers [start, stop)."""
        pieces = self._pieces(start, stop, shape)
        parameters = [trainable(piece) for piece in pieces]
        trained = {name: value for own in parameters for name, value in own.items()}  # What is tied is in two pieces.
        names = [*trained]
        first, last = start == 0, stop == self.num_layers
        hidden = shape.num_rows, shape.length, self.outline.width
        tokens, targets = (zeros((shape.num_rows, shape.length + 1), mx.int32) for _ in range(2))
        incoming = tokens if first else zeros(hidden, self.outline.dtypes[start])
        cotangent = zeros((), mx.float32) if last else zeros(hidden, self.outline.dtypes[stop])
        mx.eval(targets)

        def forward(incoming: mx.array, *_: mx.array) -> list[list[mx.array]]:
            return [[_inputs(pieces, incoming, targets)[-1]]]

        def backward(incoming: mx.array, cotangent: mx.array, *given: mx.array) -> list[list[mx.array]]:
            result, of_input, gradients = _vjp(pieces, parameters, incoming, cotangent, targets, given[: len(values)])
            for name, held in zip(names * shape.sums.num_added, given[len(values) :], strict=True):
                gradients[name] = gradients[name] + held
            buckets = to_buckets(gradient_layout(gradients), gradients)
            if shape.order == "bucket by bucket":
                return [[result], *buckets]
            flat = [gradients[name] for name in names] if shape.order == "stage" else [*chain(*buckets)]
            return [[result], of_input, flat] if shape.keep else [of_input, [result, *flat]]

        values = [value for own in parameters for value in own.values()]
        sums = [zeros(value.shape, value.dtype) for value in trained.values()] * shape.sums.num_added
        with contextlib.ExitStack() as stack:
            for piece, own in zip(pieces, parameters, strict=True):
                stack.callback(piece.update, tree_unflatten(list(own.items())))
                if shape.groups is not None:
                    isolate(piece, check=False)
                    stack.enter_context(packed(piece, shape.groups, exported=True))
            ran, *phases = Phase(0.0, 0, 0), *trace(backward, [incoming, cotangent, *values], own=sums)
            if shape.order == "bucket by bucket":
                ran, *rest = phases
                peak_bytes = max(phase.peak_bytes for phase in phases)
                phases = [Phase(sum(phase.flops for phase in rest), peak_bytes, 0), Phase(0.0, 0, 0)]
                ran = Phase(ran.flops, 0, 0)
            elif shape.keep:
                ran, *phases = phases
            elif not last:
                ran = trace(forward, [incoming])[0]._replace(held_bytes=0)  # What is made is sent away.
        of_input, of_weights = phases
        kept_bytes = (shape.sums.num_held - shape.sums.num_added) * sum(value.nbytes for value in trained.values())
        return StageWork(
            forward_flops=ran.flops,
            backward_flops=of_input.flops,
            weight_flops=of_weights.flops,
            held_bytes=ran.held_bytes + (0 if first else self.input_bytes(start, shape)),
            residual_bytes=of_input.held_bytes,
            working_bytes=max(ran.peak_bytes, of_input.peak_bytes, of_weights.peak_bytes) - ran.held_bytes + kept_bytes,
        )

    def _pieces(self, start: int, stop: int, shape: Shape) -> list[Stage]:
        """What is computed again at a time, layer by layer; or all at once. A head is not computed again."""
        if not shape.checkpointed:
            return [cut(twin(self._model), start, stop)]
        pieces = [cut(twin(self._model), number, number + 1, head=False) for number in range(start, stop)]
        if stop == self.num_layers:
            pieces.append(pass_by(cut(twin(self._model), stop - 1, stop), stop - 1))
        return pieces


def zeros(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """That take no memory."""
    return mx.broadcast_to(mx.zeros((), dtype), shape)


def _inputs(pieces: Sequence[Stage], incoming: mx.array, targets: mx.array) -> list[mx.array]:
    """What enters each of the pieces that a stage is computed in, and the result of the last."""
    arrays = [incoming]
    for piece in pieces:
        arrays.append(_result(piece, arrays[-1], targets))
    return arrays


def _result(piece: Stage, incoming: mx.array, targets: mx.array) -> mx.array:
    inputs = incoming[:, :-1] if piece.span.is_first else incoming
    if not piece.span.is_last:
        return piece(inputs)
    return summed_loss(lambda _: piece(inputs), targets, mx.ones(targets.shape, mx.bool_))


def _vjp(
    pieces: Sequence[Stage],
    parameters: Sequence[Arrays],
    incoming: mx.array,
    cotangent: mx.array,
    targets: mx.array,
    values: Sequence[mx.array],
) -> tuple[mx.array, list[mx.array], Arrays]:
    """Result, gradient of the input unless it is tokens, and gradients of what is trained.

    Several pieces are computed as `mx.checkpoint` has it: of each its input is kept, and it is computed again when its
    output is there, which MLX does where the backward pass comes to it.
    """
    left = iter(values)
    given = [{name: next(left) for name in own} for own in parameters]
    for piece, own in zip(pieces, given, strict=True):
        piece.update(tree_unflatten(list(own.items())))
    head = pieces[-1] if len(pieces) == 1 or pieces[-1].span.is_last else None
    inputs = _inputs(pieces[:-1] if head else pieces, incoming, targets)
    of_input: list[mx.array] = [cotangent]
    gradients: Arrays = {}
    result = inputs[-1]
    for index in reversed(range(len(pieces))):
        entering = inputs[index]
        if pieces[index] is not head:
            entering = mx.depends([entering], [inputs[index + 1]])[0]
        again, of_input, of_weights = _vjp_of(pieces[index], given[index], entering, of_input, targets)
        for name, gradient in zip(given[index], of_weights, strict=True):  # What is tied may be in two pieces.
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        if pieces[index] is head:
            result = again
    return result, of_input, gradients


def _vjp_of(
    piece: Stage, parameters: Arrays, incoming: mx.array, cotangent: list[mx.array], targets: mx.array
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    def apply(*primals: mx.array) -> list[mx.array]:
        piece.update(tree_unflatten(list(zip(parameters, primals, strict=False))))
        return [_result(piece, incoming if piece.span.is_first else primals[-1], targets)]

    primals = [*parameters.values()] if piece.span.is_first else [*parameters.values(), incoming]
    if not primals:  # Nothing is trained here, nor before.
        return apply()[0], [], []
    (result,), gradients = mx.vjp(apply, primals, cotangent)
    return result, gradients[len(parameters) :], gradients[: len(parameters)]
