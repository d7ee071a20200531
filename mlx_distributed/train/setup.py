"""What a run begins with: the optimizer, the buckets in which sums travel, and the state before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays, BucketLayout, backward_order, make_layout
from mlx_distributed.config import Config
from mlx_distributed.parallel.adamw import DistributedAdamW
from mlx_distributed.parallel.shard import Part, Range
from mlx_distributed.train import outer
from mlx_distributed.train.loss_scale import LossScale
from mlx_distributed.train.state import Inner, TrainState


def make_optimizer(config: Config) -> DistributedAdamW:
    """The optimizer that the configuration asks for."""
    return DistributedAdamW(config.optimizer.betas, config.optimizer.eps, config.optimizer.weight_decay)


def gradient_layout(parameters: Arrays, wire: str = "fp32") -> tuple[BucketLayout, ...]:
    """Buckets of the gradients, from the last layer to the first."""
    return make_layout({name: parameters[name] for name in backward_order(list(parameters))}, wire=wire)


def exchange_layout(parameters: Arrays, config: Config) -> tuple[BucketLayout, ...]:
    """Buckets of what workers exchange in a run: gradients, or the fragments of their differences one by one."""
    if config.parallel.sync == "diloco":
        return tuple(bucket for fragment in outer.make_fragments(parameters, config) for bucket in fragment)
    return gradient_layout(parameters, config.parallel.wire)


def owned_slices(layout: Sequence[BucketLayout], comm: Communicator) -> tuple[Range, ...]:
    """Of each bucket, what this rank of a group owns."""
    return tuple(owned[comm.rank] for owned in comm.slices(layout))


def init_state(model: nn.Module, config: Config, comm: Communicator) -> TrainState:
    """The state before the first step: of all moments, or of those that this rank of the group owns.

    Raises:
        ConfigError: the model cannot be cut into as many fragments as the configuration asks for.
    """
    state, optimizer = TrainState(model, {}), make_optimizer(config)
    state.loss_scale = LossScale() if config.precision == "fp16" else None
    parameters = state.parameters
    if config.parallel.sync == "diloco":
        num_fragments = len(outer.make_fragments(parameters, config))
        inner = TrainState(outer.twin(model), optimizer.init(parameters))
        state.inner = Inner(inner, [0] * num_fragments)
        state.optimizer = outer.init_momentum(parameters)
        return state
    if config.optimizer.shard:
        layout = gradient_layout(parameters, config.parallel.wire)
        state.parts = [Part.zeros(layout, owned_slices(layout, comm))]
    state.optimizer = optimizer.init({} if state.parts else parameters)
    return state
