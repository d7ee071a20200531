"""The outer optimizer: twins of models, fragments, and a Nesterov step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from train_samples import CONFIG, TinyModel

from mlx_distributed.comm.buckets import Arrays, backward_order, layer_of
from mlx_distributed.config import Config, LoraConfig
from mlx_distributed.config.schema import DilocoConfig, ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import Method, load, prepare, trainable
from mlx_distributed.testing import tiny_model
from mlx_distributed.train.outer import (
    NUM_TOKENS,
    differences,
    init_momentum,
    make_fragments,
    momentum_name,
    names_of,
    nesterov,
    twin,
)

TOKENS = mx.arange(24).reshape(2, 12)


def in_fragments(num: int, wire: str = "fp32") -> Config:
    diloco = DilocoConfig(sync_every=99, fragments=num)
    parallel = replace(CONFIG.parallel, sync="diloco", diloco=diloco, wire=wire)  # type: ignore[arg-type]
    return replace(CONFIG, parallel=parallel)


@pytest.mark.parametrize(
    ("method", "model_type", "quantised"),
    [("full", "qwen3", False), ("full", "llama", False), ("lora", "qwen3", False), ("lora", "qwen3", True),
     ("dora", "llama", True)],
)  # fmt: skip
def test_a_twin_shares_arrays_and_not_modules(tmp_path: Path, method: Method, model_type: str, quantised: bool) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny_model(tmp_path / "model", model_type=model_type))))
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    prepare(model, method, LoraConfig(rank=2, dropout=0.5), 0)
    other = twin(model)
    mine, theirs = (dict(tree_flatten(each.parameters())) for each in (model, other))
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    modules = {id(module) for _, module in model.named_modules()}
    assert len(modules) == len(model.named_modules()) == len(other.named_modules())
    assert modules.isdisjoint(id(module) for _, module in other.named_modules())
    assert list(trainable(other)) == list(trainable(model))
    assert other.training
    for each in (model, other):
        each.eval()
    before = model(TOKENS)
    assert mx.array_equal(other(TOKENS), before)
    other.update(tree_unflatten([(name, array + 1.0) for name, array in trainable(other).items()]))
    assert not mx.allclose(other(TOKENS), before)
    assert mx.array_equal(model(TOKENS), before)
    assert all(array is mine[name] for name, array in dict(tree_flatten(model.parameters())).items())


UNITS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=3), min_size=1, max_size=9)


@settings(deadline=None)
@given(layers=UNITS, others=st.lists(st.integers(1, 2000), max_size=4), data=st.data())
def test_fragments_are_whole_layers_of_about_the_same_size(
    layers: list[list[int]], others: list[int], data: st.DataObject
) -> None:
    sizes = {f"model.layers.{i}.{j}.weight": size for i, layer in enumerate(layers) for j, size in enumerate(layer)}
    sizes |= dict(
        zip(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "zeta"), others, strict=False)
    )
    num_units = len(layers) + len(others)
    num = data.draw(st.integers(1, num_units))
    fragments = make_fragments({name: mx.zeros(size) for name, size in sizes.items()}, in_fragments(num, "int8"))
    names = [names_of(fragment) for fragment in fragments]
    assert len(names) == num
    assert sorted(name for fragment in names for name in fragment) == sorted(sizes)
    order = backward_order(list(sizes))
    assert all(fragment == [name for name in order if name in fragment] for fragment in names)
    for layer in range(len(layers)):
        assert len({index for index, fragment in enumerate(names) for n in fragment if layer_of(n) == layer}) == 1
    found = [sum(sizes[name] for name in fragment) for fragment in names]
    assert max(found) - min(found) <= max([sum(layer) for layer in layers] + others)
    assert all(bucket.wire == "int8" for fragment in fragments for bucket in fragment)


def test_neighbours_are_in_different_fragments() -> None:
    parameters = {f"layers.{i}.weight": mx.zeros(7) for i in range(9)}
    fragments = make_fragments(parameters, in_fragments(3))
    layers = [[layer_of(name) for name in names_of(fragment)] for fragment in fragments]
    assert layers == [[8, 5, 2], [7, 4, 1], [6, 3, 0]]


def test_what_is_large_is_balanced_by_what_is_not() -> None:
    parameters = {f"layers.{i}.weight": mx.zeros(3) for i in range(4)} | {"embed.weight": mx.zeros(12)}
    layers, embedding = sorted(
        make_fragments(parameters, in_fragments(2)), key=lambda fragment: -len(names_of(fragment))
    )
    assert names_of(layers) == [f"layers.{i}.weight" for i in (3, 2, 1, 0)]
    assert names_of(embedding) == ["embed.weight"]


def test_more_fragments_than_layers_are_refused() -> None:
    parameters = trainable(TinyModel())  # two layers, head, embedding, and two arrays of the norm
    assert len(make_fragments(parameters, in_fragments(6))) == 6
    with pytest.raises(ConfigError) as error:
        make_fragments(parameters, in_fragments(7))
    assert str(error.value) == (
        "parallel.diloco.fragments=7: what is trained consists of 6 layers and other arrays, and a layer is not cut; "
        "use 6 or less"
    )


def test_no_name_of_a_model_is_that_of_the_counter() -> None:
    parameters = trainable(TinyModel())
    assert NUM_TOKENS not in parameters
    parts = differences(["norm.bias"], parameters, parameters, 1 << 40)
    assert parts.keys() == {"norm.bias", NUM_TOKENS}
    assert parts[NUM_TOKENS].tolist() == [1 << 40]


@pytest.mark.parametrize(("learning_rate", "decay"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_steps_are_those_of_nesterov(learning_rate: float, decay: float) -> None:
    """Against numpy in double precision, over several steps of three workers that have trained on unequally much."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (7,)}
    agreed: Arrays = {name: mx.array(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    momentum = init_momentum(agreed)
    assert {name: array.tolist() for name, array in momentum.items()} == {
        momentum_name(name): np.zeros(shape).tolist() for name, shape in shapes.items()
    }
    exact = {name: np.asarray(array, np.float64) for name, array in agreed.items()}
    velocity = {name: np.zeros(shape) for name, shape in shapes.items()}
    for _ in range(6):
        num_tokens = rng.integers(1, 5000, 3).tolist()
        copies = [{n: a + mx.array(rng.normal(0, 0.1, a.shape), mx.float32) for n, a in agreed.items()} for _ in "abc"]
        parts = [differences(list(shapes), agreed, copy, num) for copy, num in zip(copies, num_tokens, strict=True)]
        sums = {name: parts[0][name] + parts[1][name] + parts[2][name] for name in parts[0]}
        assert sums[NUM_TOKENS].item() == sum(num_tokens)
        for name in shapes:
            moved_by = [exact[name] - np.asarray(copy[name], np.float64) for copy in copies]
            mean = np.average(moved_by, axis=0, weights=num_tokens)
            velocity[name] = decay * velocity[name] + mean
            exact[name] = exact[name] - learning_rate * (mean + decay * velocity[name])
        moved, kept = nesterov(agreed, momentum, sums, learning_rate, decay)
        agreed, momentum = moved, kept
        for name in shapes:
            np.testing.assert_allclose(np.asarray(agreed[name]), exact[name], rtol=0, atol=2e-5)
            np.testing.assert_allclose(np.asarray(momentum[momentum_name(name)]), velocity[name], rtol=0, atol=2e-5)


def test_only_what_is_in_the_sums_moves() -> None:
    agreed = {"a": mx.ones(2), "b": mx.ones(3)}
    sums = {"b": mx.full((3,), 8.0), NUM_TOKENS: mx.array([4], mx.int64)}
    moved, kept = nesterov(agreed, init_momentum(agreed), sums, 0.5, 0.0)
    assert {name: array.tolist() for name, array in moved.items()} == {"b": [0.0] * 3}
    assert {name: array.tolist() for name, array in kept.items()} == {momentum_name("b"): [2.0] * 3}
