"""Packed rows: several follow each other in one sequence, and each is computed as if it stood there alone.

Only what mixes tokens must know, which in a transformer is one module of each layer: what goes into it is laid out row
by row, and what comes out is put back into the sequence. So attention costs what the rows cost, positions begin at 0 in
each, and nothing depends on the kind of attention. The masks of a model are made for the whole sequence, and the first
so many places of them are that of a row.

Shapes: T tokens of the sequence, D width, S rows of a group, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.outline import mixed
from mlx_distributed.models.prepare import layers
from mlx_distributed.models.random_state import random_key
from mlx_distributed.models.stages import Stage

_MIXERS = {
    *("attention", "attn", "self_attention", "self_attn"),
    *("conv", "linear_attn", "mamba", "mixer", "temporal_block"),
}
"""Common names of the modules of a layer that mix tokens."""
_TOLERANCE = 1e-2
"""Of the largest value, for rounding: a place that matters makes a difference of the size of the values."""


def isolate(model: nn.Module, check: bool = True) -> None:
    """Let a model that is ready to train, or a stage of one, take packed rows; see `packed`. Nothing else changes.

    Args:
        model: or a stage, prepared for training.
        check: run it over a few tokens twice, to see that rows are isolated indeed.

    Raises:
        ConfigError: its layers mix tokens elsewhere than in a module that is known to, or with more than a mask.
    """
    architecture = getattr(model, "model_type", type(model).__name__)
    shared = _Shared(architecture)
    for number, layer in enumerate(layers(model)):
        mixers: list[Any] = [part for name, part in layer.children().items() if name in _MIXERS]
        if not mixers:
            known = ", ".join(sorted(_MIXERS))
            raise _refusal(architecture, f"layer {number} has no part that is known to mix tokens ({known})")
        for mixer in mixers:
            cls: type[nn.Module] = type(mixer)
            mixer.__class__ = mixed(_Isolated, cls)
            mixer.packing = shared
    holder: Any = model
    holder.packing = shared
    if check:
        _check(model, architecture)


@contextmanager
def packed(model: nn.Module, groups: Sequence[Sequence[int]] | None, exported: bool = False) -> Iterator[None]:
    """Within, the model is given tokens [1, T], or hidden states [1, T, D], of rows that follow each other.

    It must span whatever calls the model: with gradient checkpointing, the making of the backward pass too.

    Args:
        model: that has been `isolate`d.
        groups: lengths of the rows, which add up to T; attention computes the rows of a group at once, padded to the
            longest of them. None where rows stand side by side as usual.
        exported: with the gradients that MLX has itself, which take as much memory and longer: a graph with others
            cannot be exported.
    """
    if groups is None:
        yield
        return
    shared: Any = model.packing
    shared.layout = _Layout(groups, exported)
    try:
        yield
    finally:
        shared.layout = None


class _Layout:
    """Where the tokens of packed rows stand when the rows of a group are laid out side by side, [S, L]."""

    def __init__(self, groups: Sequence[Sequence[int]], exported: bool) -> None:
        self.num_tokens = 0
        self.lengths = np.repeat(rows := np.concatenate([*map(np.asarray, groups)]), rows)
        """By token, those of its row."""
        self.shapes = [(len(lengths), max(lengths)) for lengths in groups]
        index, is_token = [], []
        for lengths, (_, longest) in zip(groups, self.shapes, strict=True):
            own, places = np.asarray(lengths), np.arange(longest)
            starts = self.num_tokens + own.cumsum() - own
            # Padding is a token again: it comes after all others of its row, so none of them sees it.
            index.append((starts[:, None] + np.minimum(places, own[:, None] - 1)).ravel())
            is_token.append((places < own[:, None]).ravel())
            self.num_tokens += int(own.sum())
        flat, real = np.concatenate(index), np.concatenate(is_token)
        from_flat, from_grid = mx.array(flat), mx.array(np.flatnonzero(real))
        self._spread: Any = lambda x: x[from_flat]
        self._join: Any = lambda x: x[from_grid]
        if not exported:  # The gradient of taking some is taking some, too; MLX's own adds up one by one.
            where = mx.array(real[:, None])
            self._spread, self._join = mx.custom_function(self._spread), mx.custom_function(self._join)
            self._spread.vjp(lambda _, cotangent, __: cotangent[from_grid])
            self._join.vjp(lambda _, cotangent, __: mx.where(where, cotangent[from_flat], mx.array(0, cotangent.dtype)))
        self._edges = np.cumsum([rows * longest for rows, longest in self.shapes])[:-1].tolist()

    def spread(self, x: mx.array) -> list[mx.array]:
        """[1, T, D] -> [S, L, D] by group."""
        parts = mx.split(self._spread(x[0]), self._edges)
        return [part.reshape(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, grids: Sequence[mx.array]) -> mx.array:
        """[S, L, D] by group -> [1, T, D]."""
        return self._join(mx.concatenate([grid.flatten(0, 1) for grid in grids]))[None]


@dataclass
class _Shared:
    """What the isolated modules of a model share."""

    architecture: str
    layout: _Layout | None = None
    """During a call with packed rows."""


class _Isolated:
    """Mixed into the class of a module that mixes tokens."""

    packing: _Shared

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward, layout = super().__call__, self.packing.layout  # type: ignore[misc]
        if layout is None:
            return forward(*args, **kwargs)
        hidden, *others = *args, *kwargs.values()
        if not isinstance(hidden, mx.array) or hidden.shape[:-1] != (1, layout.num_tokens):
            raise _refusal(self.packing.architecture, f"{_name(self)} is called without a hidden state [B, L, D]")
        at_entry = random_key()
        after_first, results = at_entry, []
        for number, grid in enumerate(layout.spread(hidden)):
            if number == 1:
                after_first = random_key()
            if number and after_first != at_entry:
                mx.random.seed((at_entry + number) % 2**64)
            given = [grid, *(_first(value, layout.num_tokens, grid.shape[1], self) for value in others)]
            result = forward(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
            if not isinstance(result, mx.array) or result.shape[:-1] != grid.shape[:-1]:
                raise _refusal(self.packing.architecture, f"{_name(self)} returns more than a hidden state [B, L, D]")
            results.append(result)
        if after_first != at_entry:
            # As many draws as of a single call, so that a stage of a pipeline knows how many were before it.
            mx.random.seed(after_first)
        return layout.join(results)


def _first(value: Any, num_tokens: int, length: int, module: Any) -> Any:
    """A mask for the sequence, cut to that of a row; other arguments that a call without a cache has stay."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, mx.array) and value.ndim >= 2 and value.shape[-2:] == (num_tokens, num_tokens):
        return value[..., :length, :length]
    raise _refusal(module.packing.architecture, f"{_name(module)} is called with more than a hidden state and a mask")


def _check(model: nn.Module, architecture: str) -> None:
    """Compare a row with the same one behind another row, and with what it begins with, which stands before it."""
    short, row = [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]
    was_training, key = model.training, random_key()
    inputs = _inputs(model, len(row))
    model.eval()
    try:
        with packed(model, [[len(short), len(row)]]):
            first, second = (model(inputs[:, mx.array(before + row)])[0] for before in (short, row[:2:-1]))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _refusal(architecture, f"it does not run over packed rows ({error})") from error
    finally:
        model.train(was_training)
        mx.random.seed(key)
    begun, whole = first[: len(short)], first[len(short) :]
    if not mx.array_equal(whole, second[len(short) :], equal_nan=True):
        raise _refusal(architecture, "what it computes for a row depends on the row before")
    if mx.abs(whole[: len(short)] - begun).max() > _TOLERANCE * mx.abs(whole).max():
        raise _refusal(architecture, "what it computes for a row depends on the place of the row in the sequence")


def _inputs(model: nn.Module, num: int) -> mx.array:
    """So many different tokens [1, num], or for a later stage hidden states [1, num, D]."""
    if isinstance(model, Stage) and not model.span.is_first:
        return mx.random.normal((1, num, model.width)).astype(model.dtype)
    return mx.arange(num)[None]


def _name(module: nn.Module) -> str:
    return f"its {type(module).__name__}"


def _refusal(architecture: str, reason: str) -> ConfigError:
    return ConfigError(
        f"data.packing=true: rows of the architecture {architecture} cannot be isolated from each other, as {reason}; "
        "train it without packing (rows of similar length are put together anyway, so that little is padded), or use "
        "for example a llama, qwen, mistral, gemma or phi3 model"
    )
