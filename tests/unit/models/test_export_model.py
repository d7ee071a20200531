"""Adapters fused, weights dequantised, and taken out of a model one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import CheckpointError, ConfigError
from mlx_distributed.models import Method, load, prepare, save_final, trainable
from mlx_distributed.models.export import adapt, adapters, check_loads, check_whole, fuse, take
from mlx_distributed.models.precision import cast
from mlx_distributed.models.tensor_file import write_tensors
from mlx_distributed.models.upstream import dequantize_model
from mlx_distributed.testing import tiny_model

TOKENS = mx.arange(24).reshape(2, 12)


def adapted(base: Path, method: Method, *, bits: int | None = None, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A model whose adapters have all moved, in evaluation mode."""
    model, _, _ = load(ModelConfig(path=str(base)))
    model.update(cast(model, model.parameters(), dtype))
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    prepare(model, method, LoraConfig(), 0)
    model.update(tree_map(lambda array: array + 0.05 * mx.random.normal(array.shape), model.trainable_parameters()))
    model.eval()
    return model


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_fused_model_answers_as_the_adapted_one(tiny: Path, method: Method, bits: int | None) -> None:
    model = adapted(tiny, method, bits=bits)
    before = model(TOKENS)
    assert fuse(model, requantize=False) == 0
    assert adapters(model) == {}
    assert mx.allclose(model(TOKENS), before, rtol=1e-4, atol=1e-4)
    dequantize_model(model)  # the layers that have no adapters
    assert mx.allclose(model(TOKENS), before, rtol=1e-4, atol=1e-4)
    assert all(array.dtype == mx.float32 for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_quantised_model_stays_so_and_the_sum_is_rounded_once(tiny: Path, method: Method) -> None:
    model, plain = (adapted(tiny, method, bits=4, dtype=mx.bfloat16) for _ in range(2))
    kinds = {name: (array.shape, array.dtype) for name, array in tree_flatten(model.parameters())}
    assert fuse(model, requantize=True) == 14
    fuse(plain, requantize=False)
    after = dict(tree_flatten(model.parameters()))
    assert {name: (array.shape, array.dtype) for name, array in after.items()} == {
        name.replace(".linear.", "."): kind
        for name, kind in kinds.items()
        if name.split(".")[-1][:5] not in ("lora_", "m")
    }
    for name, layer in model.named_modules():
        if name.endswith("proj"):
            whole = dict(tree_flatten(plain.parameters()))[f"{name}.weight"]
            assert whole.dtype == mx.bfloat16
            assert mx.array_equal(layer.weight, mx.quantize(whole, group_size=32, bits=4)[0])


def test_weights_are_in_memory_one_by_one(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden_size=256, num_layers=8)
    adapter = tmp_path / "adapter"
    source = ModelConfig(path=str(base))
    model, tokenizer, config = load(source, lazy=True)
    prepare(model, "lora", LoraConfig(), 0, lazy=True)
    save_final(adapter, model, tokenizer, config, source=source, method="lora", lora=LoraConfig())
    model, _, _ = load(source, lazy=True)
    adapt(model, adapter)
    fuse(model, requantize=True)
    weights = take(model)
    total_bytes = sum(array.nbytes for array in weights.like.values())
    mx.clear_cache()
    mx.reset_peak_memory()
    held_bytes = mx.get_active_memory()
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_tensors(file, weights)
    assert mx.get_peak_memory() - held_bytes < total_bytes / 4
    assert sum(array.nbytes for array in mx.load(str(tmp_path / "model.safetensors")).values()) == total_bytes


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    source = ModelConfig(path=str(tiny))
    model, tokenizer, config = load(source)
    prepare(model, "lora", LoraConfig(), 0)
    save_final(tmp_path / "a", model, tokenizer, config, source=source, method="lora", lora=LoraConfig())
    return tmp_path / "a"


def test_an_adapter_for_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny_model(tmp_path / "wide", hidden_size=64))), lazy=True)
    with pytest.raises(ConfigError, match=r"cannot be put on its model: .*does not match"):
        adapt(model, adapter)


def test_an_adapter_with_a_gap_is_refused(tiny: Path, adapter: Path) -> None:
    arrays = mx.load(str(adapter / "adapters.safetensors"))
    name = min(arrays)
    mx.eval(arrays)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {n: a for n, a in arrays.items() if n != name})
    model, _, _ = load(ModelConfig(path=str(tiny)), lazy=True)
    with pytest.raises(ConfigError, match=f"is not whole: {name} is missing"):
        adapt(model, adapter)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_layers": 2, "lora_parameters": 3}'])
def test_a_damaged_adapter_is_refused(tiny: Path, adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    model, _, _ = load(ModelConfig(path=str(tiny)), lazy=True)
    with pytest.raises(ConfigError, match="cannot be put on its model"):
        adapt(model, adapter)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, -1])
def test_torn_weights_are_found_without_reading_them(tiny: Path, tmp_path: Path, num_bytes: int) -> None:
    folder = shutil.copytree(tiny, tmp_path / "torn")
    check_loads(folder, trust_remote_code=False)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not whole: .*; copy it anew"):
        check_whole(folder)


def test_a_file_of_something_else_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(CheckpointError, match="is not whole"):
        check_whole(tmp_path)


def test_what_does_not_fit_its_configuration_is_found(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(CheckpointError, match="does not load again"):
        check_loads(folder, trust_remote_code=False)


def test_adapters_are_those_that_are_trained(tiny: Path) -> None:
    model = adapted(tiny, "dora")
    assert adapters(model).keys() == trainable(model).keys()
