from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import Method, fingerprint, layers, load, prepare, trainable
from mlx_distributed.testing import tiny_model

TOKENS = mx.arange(24).reshape(2, 12)
LINEAR = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{part}_proj" for part in "koqv"))


def prepared(folder: Path, method: Method, seed: int = 0, **lora: object) -> nn.Module:
    model, _, _ = load(ModelConfig(path=str(folder)))
    prepare(model, method, LoraConfig(**lora), seed)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_full_trains_every_parameter(tmp_path: Path, tied: bool) -> None:
    folder = tiny_model(tmp_path / "model", tied=tied)
    model, _, _ = load(ModelConfig(path=str(folder), dtype="bfloat16"))
    prepare(model, "full", LoraConfig(), 0)
    assert set(trainable(model)) == set(dict(tree_flatten(model.parameters())))
    assert ("lm_head.weight" in trainable(model)) != tied
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(trainable(model))
    assert {array.dtype for array in trainable(model).values()} == {mx.float32}
    assert model.training


def test_lora_adapts_all_linear_layers_and_nothing_else(tiny: Path) -> None:
    model = prepared(tiny, "lora", rank=4, alpha=2.0, dropout=0.25)
    expected = [f"model.layers.{n}.{name}.lora_{ab}" for n in (0, 1) for name in LINEAR for ab in "ab"]
    assert list(trainable(model)) == sorted(expected)
    layer = model.layers[1].mlp.up_proj
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.scale) == ((32, 4), (4, 64), 0.5)
    assert layer.dropout.training
    assert model.training


def test_dora_also_trains_magnitudes(tiny: Path) -> None:
    model = prepared(tiny, "dora", target_modules=("q_proj",))
    names = [name.removeprefix("model.layers.0.self_attn.q_proj.") for name in trainable(model)][:3]
    assert names == ["lora_a", "lora_b", "m"]


@pytest.mark.parametrize(("given", "scale"), [({}, 2.0), ({"rank": 4}, 4.0), ({"scale": 20.0}, 20.0)])
def test_scale_is_alpha_over_rank(tiny: Path, given: dict[str, float], scale: float) -> None:
    assert prepared(tiny, "lora", **given).layers[0].mlp.up_proj.scale == scale


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_change_nothing_at_first_and_follow_the_seed(tiny: Path, method: Method) -> None:
    base, _, _ = load(ModelConfig(path=str(tiny)))
    first, again, other = (trainable(prepared(tiny, method, seed)) for seed in (5, 5, 6))
    assert all(mx.array_equal(first[name], again[name]) for name in first)
    assert not all(mx.array_equal(first[name], other[name]) for name in first)
    assert mx.allclose(prepared(tiny, method)(TOKENS), base(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj", "mlp.up_proj"), {"self_attn.q_proj", "mlp.up_proj"}),
        (("self_attn.v_proj",), {"self_attn.v_proj"}),
    ],
)
def test_targets_are_whole_names_or_last_parts(tiny: Path, targets: tuple[str, ...], names: set[str]) -> None:
    model = prepared(tiny, "lora", target_modules=targets, num_layers=1)
    assert set(trainable(model)) == {f"model.layers.1.{name}.lora_{ab}" for name in names for ab in "ab"}


@pytest.mark.parametrize("targets", [("q_prj",), ("q_proj", "q_prj"), ("embed_tokens",), ("attn.q_proj",), ("norm",)])
def test_a_target_that_matches_nothing_is_refused(tiny: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError, match=rf"has {targets[-1]}, but a linear layer .* one of mlp\.down_proj, .*v_proj;"
    ):
        prepared(tiny, "lora", target_modules=targets)


@pytest.mark.parametrize("num_layers", [3, 0, -2])
def test_more_layers_than_there_are_is_refused(tiny: Path, num_layers: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"num_layers={num_layers} does not fit the 2 layers .* 1 to 2, or -1 for all"
    ):
        prepared(tiny, "lora", num_layers=num_layers)


def test_experts_take_lora_and_not_dora(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", model_type="mixtral")
    model = prepared(folder, "lora")
    assert "model.layers.0.block_sparse_moe.switch_mlp.up_proj.lora_a" in trainable(model)
    with pytest.raises(
        ConfigError, match=r"method=dora cannot adapt block_sparse_moe\.switch_mlp\.down_proj, .*experts"
    ):
        prepared(folder, "dora")
    prepared(folder, "dora", target_modules=("q_proj",))


class Bare(nn.Module):
    """A model whose blocks have no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.RMSNorm(4)]


def test_a_model_must_list_layers_with_linear_ones() -> None:
    with pytest.raises(ConfigError, match="Linear does not list its layers"):
        layers(nn.Linear(2, 2))
    assert len(layers(Bare())) == 1
    with pytest.raises(ConfigError, match=r"method=lora needs linear layers .* use full"):
        prepare(Bare(), "lora", LoraConfig(), 0)


def test_the_fingerprint_tells_models_and_their_weights_apart(tiny: Path) -> None:
    _, _, config = load(ModelConfig(path=str(tiny)))
    other = prepared(tiny, "lora", seed=0)
    norm = other.model.norm  # frozen, and two of its weights change places
    norm.weight = mx.concatenate([mx.array([2.0, 3.0]), norm.weight[2:]])
    swapped = prepared(tiny, "lora", seed=0)
    swapped.model.norm.weight = mx.concatenate([mx.array([3.0, 2.0]), norm.weight[2:]])
    prints = [
        fingerprint(prepared(tiny, "lora", seed=0), config),
        fingerprint(prepared(tiny, "lora", seed=1), config),
        fingerprint(other, config),
        fingerprint(swapped, config),
        fingerprint(prepared(tiny, "lora", rank=4), config),
        fingerprint(prepared(tiny, "lora", num_layers=1), config),
        fingerprint(prepared(tiny, "full"), config),
        fingerprint(prepared(tiny, "full"), config | {"rope_theta": 1.0}),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(prepared(tiny, "lora", seed=0), config) == prints[0]
