"""Gradient checkpointing: keep a layer's input only, and compute the layer again in the backward pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_distributed.models.prepare import layers
from mlx_distributed.models.random_state import random_key


def checkpoint_layers(model: nn.Module) -> None:
    """Let every transformer block be computed again in the backward pass, while the model is in training mode.

    Gradients are the same bits as without. Only these instances change (mlx-lm's `grad_checkpoint` changes the class,
    and with it every model in the process); doing it twice changes nothing. Not for use under `mx.compile`.

    Raises:
        ConfigError: the architecture does not list its layers.
    """
    for layer in layers(model):
        if not isinstance(layer, _Checkpointed):
            layer.__class__ = _checkpointed(type(layer))


class _Checkpointed:
    """Mixed into the class of a layer."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = super().__call__  # type: ignore[misc]
        if not self.training:
            return forward(*args, **kwargs)
        # MLX calls the function once now and once more in the backward pass, where dropout must draw the same numbers
        # and the numbers drawn after it must not change.
        at_entry = random_key()
        recomputing = False

        def run(parameters: dict[str, Any], args: Any, kwargs: Any) -> Any:
            nonlocal recomputing
            at_call, held = random_key(), self.trainable_parameters()
            mx.random.seed(at_entry)
            self.update(parameters)
            outputs = forward(*args, **kwargs)
            self.update(held)  # the tracers of the backward pass must not stay in the module
            if recomputing:
                mx.random.seed(at_call)
            recomputing = True
            return outputs

        return mx.checkpoint(run)(self.trainable_parameters(), args, kwargs)


@cache
def _checkpointed(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Checkpointed, cls), {})
