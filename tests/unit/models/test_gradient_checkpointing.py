from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.evaluate.generate import generate
from mlx_distributed.models import Method, checkpoint_layers, load, prepare
from mlx_distributed.testing import tiny_model

TOKENS = mx.arange(36).reshape(3, 12)


def prepared(folder: Path, method: Method, dropout: float = 0.0, *, checkpoint: bool) -> nn.Module:
    model, _, _ = load(ModelConfig(path=str(folder)))
    prepare(model, method, LoraConfig(dropout=dropout), 0)
    if checkpoint:
        checkpoint_layers(model)
    return model


def loss_and_gradients(model: nn.Module) -> tuple[dict[str, mx.array], mx.array]:
    """Of two batches one after the other, and a number drawn after them."""

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="sum")

    before = model.trainable_parameters()
    mx.random.seed(11)
    results = {}
    for number in range(2):
        value, gradients = nn.value_and_grad(model, loss)(TOKENS + number)
        mx.eval(value, gradients)
        model.update(before)
        results |= {f"{number}.{name}": gradient for name, gradient in tree_flatten(gradients)} | {str(number): value}
    return results, mx.random.uniform(shape=(4,))


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora", 0.3), ("dora", 0.3), ("full", 0.0)])
def test_gradients_are_the_same_bits(tmp_path: Path, model_type: str, method: Method, dropout: float) -> None:
    folder = tiny_model(tmp_path / "model", model_type=model_type)
    expected, expected_draw = loss_and_gradients(prepared(folder, method, dropout, checkpoint=False))
    results, draw = loss_and_gradients(prepared(folder, method, dropout, checkpoint=True))
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert mx.array_equal(results[name], value), name
    assert mx.array_equal(draw, expected_draw)


class Counted(nn.Module):
    """Counts how often a module is called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        return self.module(x)


def test_only_the_layers_of_this_model_are_computed_twice(tiny: Path) -> None:
    models = [prepared(tiny, "full", checkpoint=False) for _ in range(3)]
    checkpoint_layers(models[0])
    for _ in range(2):
        checkpoint_layers(models[1])
    for model, calls in zip(models, (2, 2, 1), strict=True):
        for layer in model.layers:
            layer.mlp = Counted(layer.mlp)
        value, gradients = nn.value_and_grad(model, lambda tokens, model=model: model(tokens).sum())(TOKENS)
        mx.eval(value, gradients)
        assert [layer.mlp.calls for layer in model.layers] == [calls, calls]


def test_the_model_stays_what_it_was(tiny: Path) -> None:
    plain, model = (prepared(tiny, "lora", checkpoint=checkpoint) for checkpoint in (False, True))
    assert isinstance(model.layers[0], type(plain.layers[0]))
    assert repr(model) == repr(plain)
    assert dict(tree_flatten(model.parameters())).keys() == dict(tree_flatten(plain.parameters())).keys()
    prompts = [[5, 6, 7], [8]]
    assert generate(model, prompts, 6, {2}) == generate(plain, prompts, 6, {2})


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not list its layers"):
        checkpoint_layers(nn.Linear(2, 2))
