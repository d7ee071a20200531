"""What a stage of a model takes, from the graphs that `train.pipeline` would evaluate for a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_distributed.cli.plan.graph import Phase, trace
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.models import trainable
from mlx_distributed.models.costs import Cost, costs
from mlx_distributed.models.outline import describe
from mlx_distributed.models.stages import Stage, cut
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.outer import twin


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
    """The most that is held meanwhile for the micro-batch that is computed, beside `held_bytes`."""

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops + self.weight_flops

    def working(self, split_backward: bool) -> int:
        """`working_bytes` beside what `simulate` counts."""
        return max(self.working_bytes - self.residual_bytes, 0) if split_backward else self.working_bytes


@dataclass(frozen=True)
class Shape:
    """Of micro-batches, B rows of L tokens that go in, and of how they are computed."""

    num_rows: int
    length: int
    keep: bool
    """As `parallel.pipeline.activations`."""
    checkpointed: bool
    """As `train.gradient_checkpointing`."""


class Model:
    """A model that can be cut in any way, as nothing of it is read: zeros that take no memory stand for its weights.

    Args:
        model: prepared for training, lazily; is changed.

    Raises:
        ConfigError: it cannot be cut into stages.
    """

    def __init__(self, model: nn.Module) -> None:
        model.update(tree_map(lambda array: _zeros(array.shape, array.dtype), model.parameters()))
        self._model, self.costs, self.outline = model, costs(model), describe(model)
        self.work = lru_cache(maxsize=None)(self._work)

    @property
    def num_layers(self) -> int:
        return self.outline.num_layers

    @property
    def cost(self) -> Cost:
        """Of all of it."""
        return self.costs.stage(0, self.num_layers)

    def input_bytes(self, start: int, shape: Shape) -> int:
        """Of the hidden state [B, L, D] that enters a layer."""
        return shape.num_rows * shape.length * self.outline.width * self.outline.dtypes[start].size

    def _work(self, start: int, stop: int, shape: Shape) -> StageWork:
        """Of the stage of layers [start, stop)."""
        cuts = range(start, stop + 1) if shape.checkpointed else (start, stop)
        pieces = [cut(twin(self._model), *pair) for pair in pairwise(cuts)]
        parameters = [trainable(piece) for piece in pieces]
        first, last = start == 0, stop == self.num_layers
        hidden = shape.num_rows, shape.length, self.outline.width
        tokens, targets = (_zeros((shape.num_rows, shape.length + 1), mx.int32) for _ in range(2))
        incoming = tokens if first else _zeros(hidden, self.outline.dtypes[start])
        cotangent = _zeros((), mx.float32) if last else _zeros(hidden, self.outline.dtypes[stop])
        mx.eval(targets)

        def forward(incoming: mx.array, *_: mx.array) -> list[list[mx.array]]:
            return [[_inputs(pieces, incoming, targets)[-1]]]

        def backward(incoming: mx.array, cotangent: mx.array, *values: mx.array) -> list[list[mx.array]]:
            result, of_input, gradients = _vjp(pieces, parameters, incoming, cotangent, targets, values)
            return [[result], of_input, gradients] if shape.keep else [of_input, [result, *gradients]]

        values = [value for own in parameters for value in own.values()]
        try:
            ran, *phases = Phase(0.0, 0, 0), *trace(backward, [incoming, cotangent, *values])
            if shape.keep:
                ran, *phases = phases
            elif not last:
                ran = trace(forward, [incoming])[0]._replace(held_bytes=0)  # What is made is sent away.
        finally:
            for piece, own in zip(pieces, parameters, strict=True):
                piece.update(tree_unflatten(list(own.items())))
        of_input, of_weights = phases
        return StageWork(
            forward_flops=ran.flops,
            backward_flops=of_input.flops,
            weight_flops=of_weights.flops,
            held_bytes=ran.held_bytes + (0 if first else self.input_bytes(start, shape)),
            residual_bytes=of_input.held_bytes,
            working_bytes=max(ran.peak_bytes, of_input.peak_bytes, of_weights.peak_bytes) - ran.held_bytes,
        )


def _zeros(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
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
) -> tuple[mx.array, list[mx.array], list[mx.array]]:
    """Result, gradient of the input unless it is tokens, and gradients of what is trained.

    Several pieces are computed as `mx.checkpoint` has it: of each its input is kept, and once its cotangent is there it
    is computed again.
    """
    left = iter(values)
    given = [{name: next(left) for name in own} for own in parameters]
    for piece, own in zip(pieces, given, strict=True):
        piece.update(tree_unflatten(list(own.items())))
    *inputs, result = _inputs(pieces, incoming, targets)
    of_input: list[mx.array] = [cotangent]
    gradients: list[mx.array] = []
    for piece, own, entering in zip(pieces[::-1], given[::-1], inputs[::-1], strict=True):
        if len(pieces) > 1:
            entering = mx.depends([entering], of_input)[0]
        again, of_input, of_weights = _vjp_of(piece, own, entering, of_input, targets)
        gradients = of_weights + gradients
    return again if len(pieces) == 1 else result, of_input, gradients


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
