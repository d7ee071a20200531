"""Computing in 16 bits: what is trained stays float32 in the model, and is cast whenever the model is called.

So a gradient comes back through the cast as float32, and whoever calls the model, for training, evaluation or a
pipeline stage, computes in the same precision. The cast costs a pass over what is trained; next to a forward and a
backward pass over hundreds of tokens that is nothing.

Source:
    Micikevicius et al. 2018, "Mixed Precision Training", for the float32 copy of what is trained.
"""

from __future__ import annotations

from collections.abc import Collection
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
        embeddings: dict[str, Any] = {name: part for name, part in model.named_modules() if type(part) is nn.Embedding}
        for embedding in embeddings.values():
            embedding.__class__, embedding.precision = mixed(_Embedding, nn.Embedding), precision
        lowered.looked_up = frozenset(f"{name}.weight" for name in embeddings)


def lower(model: nn.Module, parameters: dict, kept: Collection[str] = ()) -> dict:
    """Parameters of a model as it computes with them, but for the names in `kept`: itself a copy for many calls, such
    as those of generation."""
    precision = getattr(model, "precision", "fp32")
    return parameters if precision == "fp32" else cast(model, parameters, _DTYPES[precision], kept)


def cast(model: nn.Module, parameters: dict, dtype: mx.Dtype, kept: Collection[str] = ()) -> dict:
    """Cast as `mlx_lm.convert` does: floating arrays only, and not those that the architecture wants left alone, nor
    the names in `kept`."""
    castable = getattr(model, "cast_predicate", lambda name: True)

    def to_dtype(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(dtype) if floating and castable(name) and name not in kept else array

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
        self.update(lower(self, held, self.looked_up))
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.update(held)


class _Embedding:
    """Mixed into the class of an embedding: rows are cast once they are looked up, so the gradient of a row, a sum over
    all places of its token, is added in float32. MLX adds it in the type of the matrix, where a sum in bfloat16 no
    longer grows at 256 times what is added, and common tokens have thousands of places."""

    def __call__(self: Any, tokens: mx.array) -> Any:
        return super().__call__(tokens).astype(_DTYPES[self.precision])  # type: ignore[misc]

    def as_linear(self: Any, hidden: mx.array) -> mx.array:
        return hidden @ self.weight.astype(hidden.dtype).T
