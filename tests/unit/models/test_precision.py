from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config import Config
from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import check_range, compute_in, load, prepare, trainable
from mlx_distributed.models.outline import describe
from mlx_distributed.models.precision import Precision, lower
from mlx_distributed.train.outer import twin

TOKENS = mx.array([[1, 2, 3, 4, 5]])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", mx.bfloat16), ("fp16", mx.float16)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_computes_in_16_bits_and_what_is_trained_stays_float32(
    tiny: Path, precision: Precision, dtype: mx.Dtype, method: str
) -> None:
    config = Config(model=ModelConfig(path=str(tiny)), method=method, precision=precision)  # type: ignore[arg-type]
    model, _, _ = load(config.base)
    prepare(model, config.method, LoraConfig(), seed=0)
    compute_in(model, precision)
    assert model(TOKENS).dtype == dtype
    assert set(describe(model).dtypes) == {dtype}
    trained = trainable(model)
    frozen = {name: array for name, array in dict(tree_flatten(model.parameters())).items() if name not in trained}
    assert {array.dtype for array in trained.values()} == {mx.float32}
    assert {array.dtype for array in frozen.values()} == ({dtype} if method == "lora" else set())
    again = twin(model)
    assert mx.array_equal(again(TOKENS), model(TOKENS))
    model.update(lower(model, model.trainable_parameters()))
    assert mx.array_equal(again(TOKENS), model(TOKENS))
    check_range(model)


def test_a_model_that_fails_has_its_parameters_back(tiny: Path) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny)))
    prepare(model, "full", LoraConfig(), seed=0)
    compute_in(model, "bf16")
    with pytest.raises(ValueError, match="Cannot index"):
        model("no tokens")
    assert {array.dtype for array in trainable(model).values()} == {mx.float32}


def test_weights_beyond_float16_are_refused_and_bf16_takes_them(tiny: Path) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny)))
    prepare(model, "full", LoraConfig(), seed=0)
    model.model.norm.weight = model.model.norm.weight * 1e5
    compute_in(model, "fp16")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values beyond 65504.*use precision=bf16"):
        check_range(model)
    other, _, _ = load(ModelConfig(path=str(tiny)))
    compute_in(other, "bf16")
    check_range(other)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_gradient_of_a_token_counts_each_of_its_places(tiny: Path, precision: Precision) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny)))
    prepare(model, "full", LoraConfig(), seed=0)

    def gradient(num_rows: int) -> mx.array:
        held = model.trainable_parameters()

        def loss_of(parameters: dict) -> mx.array:
            model.update(parameters)
            return model(mx.full((num_rows, 1), 1))[..., 2].astype(mx.float32).sum()

        gradients = dict(tree_flatten(mx.grad(loss_of)(held)))
        model.update(held)
        return gradients["model.embed_tokens.weight"][1]

    exact = gradient(1)
    compute_in(model, precision)
    difference = gradient(5000) / 5000 - exact
    assert mx.linalg.norm(difference).item() <= 0.02 * mx.linalg.norm(exact).item()
