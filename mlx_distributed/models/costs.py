"""What the parts of a model weigh, for planning where to cut it, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distributed.models.outline import describe
from mlx_distributed.models.prepare import layers, trainable


@dataclass(frozen=True)
class Cost:
    """Of some part of a model."""

    num_parameters: int = 0
    """Values; those that are packed because they are quantised are counted one by one."""
    num_trainable: int = 0
    """Those of them that are trained: each has a gradient and two moments, of 4 bytes."""
    num_bytes: int = 0
    """That the weights take, as they are held."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.num_parameters + other.num_parameters,
            self.num_trainable + other.num_trainable,
            self.num_bytes + other.num_bytes,
        )


@dataclass(frozen=True)
class Costs:
    """Of a whole model, as it will be trained."""

    embedding: Cost
    layers: tuple[Cost, ...]
    head: Cost
    """Final norm and head. Tied to the embedding, it is a copy of that where another stage holds the first layer."""
    tied: bool

    def stage(self, start: int, stop: int) -> Cost:
        """Of a stage that holds layers [start, stop)."""
        first, last = start == 0, stop == len(self.layers)
        cost = sum(self.layers[start:stop], self.head if last else Cost())
        return cost + self.embedding if first or (last and self.tied) else cost


def costs(model: nn.Module) -> Costs:
    """Count the parts of a model, which may be lazy; with its adapters, if it will have any.

    Raises:
        ConfigError: the model cannot be cut into stages.
    """
    outline, modules = describe(model), dict(model.named_modules())
    return Costs(
        embedding=_cost(modules[name] for name in outline.embedding),
        layers=tuple(_cost([block]) for block in layers(model)),
        head=_cost(modules[name] for name in outline.norm_and_head),
        tied=outline.tied,
    )


def _cost(parts: Iterable[nn.Module]) -> Cost:
    total = Cost()
    for part in parts:
        arrays = dict(tree_flatten(part.parameters())).values()
        num_trainable = sum(array.size for array in trainable(part).values())
        num_parameters = sum(array.size for array in arrays) + sum(map(_packed, part.modules()))
        total += Cost(num_parameters, num_trainable, sum(array.nbytes for array in arrays))
    return total


def _packed(module: nn.Module) -> int:
    """How many values more than elements a module has: packed ones, but not the scales of their groups."""
    if "scales" not in module:
        return 0
    num_values = module.weight.size * 8 * module.weight.itemsize // module.bits
    return num_values - sum(module[key].size for key in ("weight", "scales", "biases") if key in module)
