"""A model that is quantised on load is the one that mlx-lm would have made of it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig, ModelConfig, QuantizeConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import load, prepare, save_final, trainable
from mlx_distributed.models.prepare import Method


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_weights_are_those_of_mlx_lms_convert(tiny: Path, tmp_path: Path, bits: int) -> None:
    mlx_lm.convert(str(tiny), str(tmp_path / "q"), quantize=True, q_bits=bits, q_group_size=32)
    stored, _, _ = load(ModelConfig(path=str(tmp_path / "q"), dtype="float32"))
    made, _, architecture = load(ModelConfig(path=str(tiny), quantize=QuantizeConfig(bits, 32)))
    assert architecture["quantization"] == {"bits": bits, "group_size": 32, "mode": "affine"}
    expected, found = (dict(tree_flatten(model.parameters())) for model in (stored, made))
    assert expected.keys() == found.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected if name.endswith(".weight"))
    again = ModelConfig(path=str(tmp_path / "q"), quantize=QuantizeConfig(bits, 32))
    with pytest.raises(ConfigError, match="stored quantised already"):
        load(again)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_adapter_of_a_quantised_model_is_loaded_onto_the_plain_one(
    tiny: Path, tmp_path: Path, method: Method
) -> None:
    source = ModelConfig(path=str(tiny), quantize=QuantizeConfig(4, 32))
    model, tokenizer, architecture = load(source)
    prepare(model, method, LoraConfig(rank=4), seed=0)
    assert {array.dtype for array in trainable(model).values()} == {mx.float32}
    final = tmp_path / "final"
    save_final(final, model, tokenizer, architecture, source=source, method=method, lora=LoraConfig(rank=4))
    described = json.loads((final / "adapter_config.json").read_text())
    assert described["quantization"] == {"bits": 4, "group_size": 32}
    plain, _ = mlx_lm.load(str(tiny), adapter_path=str(final))
    adapted = plain.model.layers[0].mlp.up_proj
    assert isinstance(adapted.linear, nn.Linear)
    assert mx.array_equal(adapted.lora_a, model.model.layers[0].mlp.up_proj.lora_a)


def test_rows_that_are_no_multiple_of_a_group_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiple of model\.quantize\.group_size=128; use a smaller one"):
        load(ModelConfig(path=str(tiny), quantize=QuantizeConfig(4, 128)))
