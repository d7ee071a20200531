"""Computing in 16 bits: what is trained stays float32 in the model, and is cast whenever the model is called.

So a gradient comes back through the cast as float32, and whoever calls the model, for training, evaluation or a
pipeline stage, computes in the same precision. The cast costs a pass over what is trained; next to a forward and a
backward pass over hundreds of tokens that is nothing.

Source:
    Micikevicius et al. 2018, "Mixed Precision Training", for the float32 copy of what is trained.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.outline import mixed

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": mx.bfloat16, "fp16": mx.float16}


def compute_in(model: nn.Module, precision: Precision) -> None:
    """Let a model that has been prepared for training compute in this precision, whenever it is called."""
    if precision != "fp32":
        lowered: Any = model
        lowered.__class__ = mixed(_Lowered, type(model))
        lowered.precision = precision


def lower(model: nn.Module, parameters: dict) -> dict:
    """Parameters of a model as it computes with them: itself a copy for many calls, such as those of generation."""
    precision = getattr(model, "precision", "fp32")
    return parameters if precision == "fp32" else cast(model, parameters, _DTYPES[precision])


def cast(model: nn.Module, parameters: dict, dtype: mx.Dtype) -> dict:
    """Cast as `mlx_lm.convert` does: floating arrays only, and not those that the architecture wants left alone."""
    castable = getattr(model, "cast_predicate", lambda name: True)

    def to_dtype(name: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and castable(name) else array

    lowered: dict = tree_map_with_path(to_dtype, parameters)
    return lowered


def check_range(model: nn.Module) -> None:
    """Look whether the weights of a model, which are read by this, fit into what it computes in.

    Raises:
        ConfigError: a weight is too large for float16, or no number.
    """
    if getattr(model, "precision", "fp32") != "fp16":
        return
    for name, array in dict(tree_flatten(lower(model, model.parameters()))).items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise ConfigError(
                f"precision=fp16 cannot take this model: {name} has values beyond 65504, the largest of float16; "
                "use precision=bf16, which has the range of float32"
            )


class _Lowered:
    """Mixed into the class of a model."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = self.trainable_parameters()
        self.update(lower(self, held))
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.update(held)
