"""What a model is made of, as far as it can be cut into pipeline stages: embedding, layers, norm and head.

Nothing is evaluated, so this is for models whose weights have not been read yet, too. Shapes: B rows, L tokens,
D width of the hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.prepare import layers
from mlx_distributed.models.random_state import DrawCounter, random_key

_EMBEDDING = {"embed_in", "embed_tokens", "embeddings", "tok_embeddings", "wpe", "wte"}
_NORM = {"embedding_norm", "final_layer_norm", "final_layernorm", "ln_f", "norm", "norm_f"}  # the first is that of lfm2
_HEAD = {"embed_out", "lm_head", "output"}
_LENGTHS = (7, 5)
"""Tokens that a model is run over. Both are no other size, so that an argument of that size is known for a mask."""


@dataclass(frozen=True)
class Outline:
    """Modules are given by their dotted names in the model."""

    layers: str
    """The list of the layers."""
    num_layers: int
    embedding: tuple[str, ...]
    norm_and_head: tuple[str, ...]
    tied: bool
    """The head is the embedding."""
    width: int
    """D."""
    dtypes: tuple[mx.Dtype, ...]
    """Of the hidden state [B, L, D] that enters each layer."""
    draws: tuple[int, ...]
    """How many times random numbers are drawn in training before each layer, of any shape: for dropout."""


def describe(model: nn.Module) -> Outline:
    """The parts of a model, found by their common names and by letting it run, without a value, over a few tokens.

    A model can be cut where every layer is called once, in order, with the hidden state that the layer before returned
    and otherwise with masks alone, and where nothing has weights but the layers, an embedding before them, and a norm
    and a head behind them. Describe it as it will be trained, with its adapters.

    Raises:
        ConfigError: the model cannot be cut; says what is in the way.
    """
    blocks = layers(model)
    place = _place(model, blocks)
    found: dict[str, set[str]] = {"embedding": set(), "norm": set(), "head": set(), "unknown": set()}
    for name in dict(tree_flatten(model.parameters())):
        if not name.startswith(f"{place}."):
            kind, module = _part(name)
            found[kind].add(module)
    if found["unknown"]:
        raise refusal(model, f"it is not known whether {', '.join(sorted(found['unknown']))} is used before its layers")
    if not found["embedding"]:
        raise refusal(model, f"none of its parts is an embedding ({', '.join(sorted(_EMBEDDING))})")
    modules = dict(model.named_modules())
    embeddings = [modules[name] for name in sorted(found["embedding"])]
    passage, shorter = (_Probe(model, blocks, embeddings, length).run() for length in _LENGTHS)
    if passage.draws != shorter.draws:
        raise refusal(model, "how often its dropout draws random numbers depends on the length of a row; 0 would do")
    return Outline(
        layers=place,
        num_layers=len(blocks),
        embedding=tuple(sorted(found["embedding"])),
        norm_and_head=tuple(sorted(found["norm"] | found["head"])),
        tied=passage.tied or not found["head"],
        width=passage.width,
        dtypes=tuple(passage.dtypes),
        draws=tuple(passage.draws),
    )


def refusal(model: nn.Module, reason: str) -> ConfigError:
    """The error for a model that cannot be cut."""
    return ConfigError(
        f"the architecture {getattr(model, 'model_type', type(model).__name__)} cannot be cut into pipeline stages: "
        f"{reason}; train it without parallel.pipeline, or use for example a llama, qwen, mistral, gemma or phi3 model"
    )


def _place(model: nn.Module, blocks: list[nn.Module]) -> str:
    """Name of the list that holds the layers."""
    for name, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, list) and [*map(id, value)] == [*map(id, blocks)]:
                return f"{name}.{key}" if name else key
    raise refusal(model, "its layers do not stand in one list")


def _part(name: str) -> tuple[str, str]:
    """Which part a parameter belongs to, and the module that is the part."""
    words = name.split(".")
    for kind, names in (("embedding", _EMBEDDING), ("norm", _NORM), ("head", _HEAD)):
        if known := names.intersection(words):
            return kind, ".".join(words[: words.index(known.pop()) + 1])
    return "unknown", name


@dataclass
class _Probe:
    """Runs a model in training mode with constants for what layers return, and notes what passes between them."""

    model: nn.Module
    blocks: list[nn.Module]
    embeddings: list[nn.Module]
    length: int
    tied: bool = False
    width: int = 0
    dtypes: list[mx.Dtype] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)

    def run(self) -> _Probe:
        """Raises ConfigError where something else than a hidden state passes."""
        was_training, key = self.model.training, random_key()
        watched: list[tuple[Any, type[nn.Module], type]] = [(block, type(block), _Layer) for block in self.blocks]
        watched += [(embedding, type(embedding), _Embedding) for embedding in self.embeddings]
        self.counter = DrawCounter()
        self.model.train()
        for part, cls, watch in watched:
            part.__class__, part.probe = mixed(watch, cls), self
        try:
            self.model(mx.zeros((1, self.length), mx.int32))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise refusal(self.model, f"it does not run over a few tokens ({error})") from error
        finally:
            for part, cls, _ in watched:
                part.__class__ = cls
                del part.probe
            self.model.train(was_training)
            mx.random.seed(key)
        if len(self.dtypes) != len(self.blocks):
            raise refusal(self.model, f"it calls {len(self.dtypes)} of its {len(self.blocks)} layers")
        return self

    def enter(self, block: nn.Module, hidden: Any, *others: Any) -> None:
        """Check what a layer is called with."""
        number = len(self.dtypes)
        if number == len(self.blocks) or block is not self.blocks[number]:
            raise refusal(self.model, "it does not call its layers once each, in their order")
        if not isinstance(hidden, mx.array) or hidden.shape[:-1] != (1, self.length):
            raise refusal(self.model, f"layer {number} is called with something else than a hidden state [B, L, D]")
        if number and not mx.array_equal(hidden, self._constant(number - 1, hidden.dtype)):
            raise refusal(self.model, f"what layer {number - 1} returns is changed before layer {number} takes it")
        if not all(_is_mask(value, self.length) for value in others):
            raise refusal(self.model, f"layer {number} is called with more than a hidden state and a mask")
        self.width = hidden.shape[-1]
        self.dtypes.append(hidden.dtype)
        self.draws.append(self.counter.count())

    def leave(self, result: Any) -> mx.array:
        """Check what a layer returns; the constant that stands for it."""
        number = len(self.dtypes) - 1
        if not isinstance(result, mx.array) or result.shape != (1, self.length, self.width):
            raise refusal(self.model, f"layer {number} returns something else than a hidden state [B, L, D]")
        return self._constant(number, result.dtype)

    def _constant(self, number: int, dtype: mx.Dtype) -> mx.array:
        return mx.full((1, self.length, self.width), number % 100 + 1, dtype)


class _Layer:
    """Mixed into the class of a layer while the model is probed."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        self.probe.enter(self, *args, *kwargs.values())
        return self.probe.leave(super().__call__(*args, **kwargs))  # type: ignore[misc]


class _Embedding:
    """Mixed into the class of an embedding while the model is probed."""

    def as_linear(self: Any, hidden: mx.array) -> mx.array:
        self.probe.tied = True
        return super().as_linear(hidden)  # type: ignore[misc]


@cache
def mixed(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a module with something mixed in, always the same one for the same two."""
    return type(cls.__name__, (mixin, cls), {})


def _is_mask(value: object, length: int) -> bool:
    """Whether an argument depends on the places of the tokens alone: a mask [..., L, L] or the name of one, a factor
    for each place, or an empty cache."""
    if isinstance(value, mx.array):
        return value.shape[-2:] == (length, length) or set(value.shape) <= {1, length}
    if isinstance(value, tuple | list):
        return all(_is_mask(item, length) for item in value)
    return value is None or isinstance(value, str | int)
