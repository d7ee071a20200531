"""What workers agree on with `parallel.sync: diloco`, and how it moves.

Every worker trains a copy of the parameters by itself (`twin`). Now and then the workers add up by how much their
copies have moved away from the parameters that they agree on, each in proportion to the label tokens that it has
trained on, and take a Nesterov step along the mean. The parameters are cut into fragments, which take turns.

Source:
    Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", and Douillard et al.
    2025, "Streaming DiLoCo with overlapping communication".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_distributed.comm.buckets import Arrays, BucketLayout, backward_order, layer_of, make_layout
from mlx_distributed.config import Config
from mlx_distributed.errors import ConfigError

NUM_TOKENS = "outer.num_tokens"
"""Travels with the differences; no parameter of a model has this name."""

Fragment = tuple[BucketLayout, ...]


def twin(model: nn.Module) -> nn.Module:
    """A second model that shares every array with the first, until one of them is given another."""
    return copy.deepcopy(model, {id(array): array for array in dict(tree_flatten(model.parameters())).values()})


def make_fragments(parameters: Arrays, config: Config) -> tuple[Fragment, ...]:
    """Parts of the parameters of about the same size, made of whole layers, neighbours in different ones.

    Raises:
        ConfigError: there are fewer layers and other arrays than fragments.
    """
    num_fragments = config.parallel.diloco.fragments
    units = [list(names) for _, names in groupby(backward_order(list(parameters)), _unit)]
    if len(units) < num_fragments:
        raise ConfigError(
            f"parallel.diloco.fragments={num_fragments}: what is trained consists of {len(units)} layers and other "
            f"arrays, and a layer is not cut; use {len(units)} or less"
        )
    sizes = [sum(parameters[name].size for name in unit) for unit in units]
    fragments: list[list[int]] = [[] for _ in range(num_fragments)]
    for unit in sorted(range(len(units)), key=lambda unit: -sizes[unit]):
        min(fragments, key=lambda fragment: (sum(sizes[i] for i in fragment), len(fragment))).append(unit)
    return tuple(
        make_layout(
            {name: parameters[name] for unit in sorted(fragment) for name in units[unit]}, wire=config.parallel.wire
        )
        for fragment in fragments
    )


def _unit(name: str) -> int | str:
    layer = layer_of(name)
    return name if layer is None else layer


def names_of(fragment: Fragment) -> list[str]:
    """Of its parameters."""
    return [leaf.name for bucket in fragment for leaf in bucket.leaves]


def init_momentum(parameters: Arrays) -> Arrays:
    """Of the outer optimizer, by `momentum_name`: zeros."""
    return {momentum_name(name): mx.zeros(parameter.shape, mx.float32) for name, parameter in parameters.items()}


def momentum_name(name: str) -> str:
    """In the state, where the momentum of a parameter is kept."""
    return f"{name}.momentum"


def differences(names: Sequence[str], agreed: Arrays, own: Arrays, num_tokens: int) -> Arrays:
    """A worker's part of the sum: how far its copy is from what was agreed on, times its label tokens since then."""
    parts = {name: (agreed[name] - own[name]) * num_tokens for name in names}
    return parts | {NUM_TOKENS: mx.array([num_tokens], mx.int64)}


def nesterov(
    agreed: Arrays, momentum: Arrays, sums: Mapping[str, mx.array], learning_rate: float, decay: float
) -> tuple[Arrays, Arrays]:
    """An outer step: new parameters and momentum, not yet evaluated.

    Args:
        agreed: parameters, among them those of the sums.
        momentum: by `momentum_name`.
        sums: of `differences` over all workers, with at least one token.
        learning_rate: of the outer step.
        decay: of the momentum.
    """
    num_tokens = sums[NUM_TOKENS].astype(mx.float32)
    moved, kept = {}, {}
    for name in (name for name in sums if name != NUM_TOKENS):
        gradient = sums[name] / num_tokens
        kept[momentum_name(name)] = velocity = decay * momentum[momentum_name(name)] + gradient
        moved[name] = agreed[name] - learning_rate * (gradient + decay * velocity)
    return moved, kept
