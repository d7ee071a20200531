"""Pipeline stages: a run of the layers of a model, with the embedding if it is the first and the head if the last.

A stage is the model itself, as its own class runs it, but for the modules that other stages hold: those have no
weights, keep everything else that the class reads of them (such as whether a layer has a sliding window), and pass the
hidden state by. So a stage computes what the whole model computes there, to the bit, and names are those of the whole.

Shapes: B rows, L tokens, D width of the hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.outline import Outline, describe, mixed, refusal
from mlx_distributed.models.prepare import Absent
from mlx_distributed.models.random_state import skip_draws


@dataclass(frozen=True)
class Span:
    """Layers [start, stop) of a model of `num_layers`."""

    start: int
    stop: int
    num_layers: int
    head: bool = True
    """Whether norm and head go with the last layer."""

    @property
    def is_first(self) -> bool:
        """Whether token ids go in."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether logits come out."""
        return self.head and self.stop == self.num_layers


class Stage(nn.Module):
    """Mixed into the class of a model by `cut`; everything else of the class stays as it is."""

    span: Span
    width: int
    """D."""
    dtype: mx.Dtype
    """Of the hidden state that goes in."""
    _passage: _Passage

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Token ids [B, L] or hidden state [B, L, D] -> hidden state or logits [B, L, V]. `cache` is of `make_cache`.

        Dropout draws what it draws in the whole model, if `mx.random` is seeded before the call as it is before a call
        of the whole; so a stage that is computed again for its backward pass must be seeded again.
        """
        if self.span.is_first:
            return self._run(inputs, cache)
        if self.training:
            skip_draws(self._passage.draws_before)
        # Another object for the same array: a layer may add to its input in place.
        self._passage.incoming = inputs.reshape(inputs.shape)
        try:
            return self._run(mx.zeros(inputs.shape[:2], mx.int32), cache)
        finally:
            self._passage.incoming = None

    def _run(self, tokens: mx.array, cache: list[Any] | None) -> mx.array:
        try:
            return super().__call__(tokens) if cache is None else super().__call__(tokens, cache=cache)
        except _Handover as handover:
            return handover.hidden


def cut(model: nn.Module, start: int, stop: int, head: bool = True) -> Stage:
    """Turn a model into its stage of layers [start, stop): the same object, with nothing left of other stages.

    To be done last, with a model that was loaded and prepared lazily: only then are the weights of the stage read or
    drawn, layer by layer, and those of other stages never. With tied embeddings the first and the last stage hold the
    matrix, under its one name. `head` is as of `Span`.

    Raises:
        ConfigError: there are no such layers, the model cannot be cut, or its weights cannot be read.
    """
    outline = describe(model)
    if not 0 <= start < stop <= outline.num_layers:
        raise ConfigError(
            f"a stage of layers {start} to {stop} (exclusive) does not fit the {outline.num_layers} layers of the model"
        )
    span, modules = Span(start, stop, outline.num_layers, head), dict(model.named_modules())
    stage = _remove(model, modules, outline, span)
    try:
        stage(_example(outline, span))  # Lazy: it costs nothing and shows whether everything that is read is there.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refusal(model, f"what layers {start} to {stop} need of it is not found ({error})") from error
    held = [modules[name] for name in (*outline.embedding, *outline.norm_and_head)]
    try:
        for module in [*held, *(modules[f"{outline.layers}.{number}"] for number in range(start, stop))]:
            mx.eval(module.state)
        mx.eval(stage.state)
    except RuntimeError as error:
        raise ConfigError(f"the weights of layers {start} to {stop} (exclusive) cannot be read: {error}") from error
    return stage


def pass_by(stage: Stage, number: int) -> Stage:
    """Take a layer away from a stage, by its number in the model: what enters goes on in its place."""
    _replace(stage.layers[number], _Before, stage._passage)
    return stage


def make_cache(stage: Stage) -> list[Any]:
    """Keys and values of the layers of a stage, to generate with: a list for all layers, as the class expects it.

    The class makes masks from the first cache of a kind, which may be of a layer that another stage holds: where this
    one has a layer of the same kind, both have its cache.

    Raises:
        ConfigError: the class keeps its caches in another way than one for each layer, or does not run with them.
    """
    # Here, not above: a model to generate with has mlx-lm imported already, in the way that `models.upstream` explains.
    from mlx_lm.models.cache import make_prompt_cache

    caches = make_prompt_cache(stage)
    blocks: list[nn.Module] = stage.layers
    if len(caches) != len(blocks):
        raise refusal(stage, f"it has {len(caches)} caches for {len(blocks)} layers, to generate with")
    kinds = [(type(cache), repr(cache.state)) for cache in caches]  # empty ones differ by their settings alone
    of_layers = list(zip(kinds, caches, blocks, strict=True))
    held = {kind: cache for kind, cache, block in of_layers if not isinstance(block, Absent)}
    return [held.get(kind, cache) if isinstance(block, Absent) else cache for kind, cache, block in of_layers]


def _remove(model: nn.Module, modules: dict[str, nn.Module], outline: Outline, span: Span) -> Stage:
    """Take away what other stages hold."""
    passage = _Passage(outline.draws[span.start])
    for number in range(outline.num_layers):
        if not span.start <= number < span.stop:
            _replace(modules[f"{outline.layers}.{number}"], _Before if number < span.start else _After, passage)
    if not span.is_first and not (span.is_last and outline.tied):
        for name in outline.embedding:
            _replace(modules[name], _Embedding, passage)
    if not span.is_last:
        for name in outline.norm_and_head:
            _replace(modules[name], _After, passage)
    stage: Any = model
    stage.__class__ = mixed(Stage, type(model))
    stage.span, stage._passage = span, passage
    stage.width, stage.dtype = outline.width, outline.dtypes[span.start]
    return stage


def _replace(module: Any, mixin: type, passage: _Passage) -> None:
    _strip(module)
    cls: type[nn.Module] = type(module)
    module.__class__ = mixed(mixin, cls)
    module.passage = passage


def _strip(tree: Any) -> None:
    """Remove all arrays below, those that are no parameters too; lists and modules stay."""
    keys: Iterable[Any] = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        if isinstance(tree[key], dict | list):
            _strip(tree[key])
        elif isinstance(tree[key], mx.array):
            if isinstance(tree, dict):
                del tree[key]
            else:
                tree[key] = None


def _example(outline: Outline, span: Span) -> mx.array:
    if span.is_first:
        return mx.zeros((1, 1), mx.int32)
    return mx.zeros((1, 1, outline.width), outline.dtypes[span.start])


@dataclass
class _Passage:
    """What the modules of a stage share."""

    draws_before: int
    """Draws of random numbers before its first layer."""
    incoming: mx.array | None = None
    """During a call, what the stage before has handed over."""


class _Handover(Exception):
    """Ends the run of the model where the stage ends."""

    def __init__(self, hidden: mx.array) -> None:
        super().__init__("another stage goes on from here")
        self.hidden = hidden


class _Embedding:
    """In place of an embedding that is not needed: zeros of the right shape, as layers before the stage ignore them."""

    def __call__(self: Any, *_: Any, **__: Any) -> mx.array:
        return mx.zeros_like(self.passage.incoming)


class _Before(Absent):
    """In place of a layer of an earlier stage: the hidden state that enters this one."""

    def __call__(self: Any, *_: Any, **__: Any) -> mx.array:
        return self.passage.incoming


class _After(Absent):
    """In place of a layer of a later stage, or of a norm or a head."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        raise _Handover(next(iter((*args, *kwargs.values()))))
