from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_distributed.config import Config
from mlx_distributed.config.checks import check
from mlx_distributed.config.schema import ModelConfig, ParallelConfig, QuantizeConfig, TrainConfig

FOUR = ModelConfig(path="org/model", quantize=QuantizeConfig(4))


def problems(**values: Any) -> dict[str, str]:
    config = Config(**{"model": ModelConfig(path="org/model"), **values})
    return {problem.key: problem.message for problem in check(config) if problem.key != "data.train"}


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"precision": "bf16", "model": ModelConfig("org/model", dtype="float32")}, "model.dtype", "leave it out"),
        ({"precision": "fp16", "parallel": ParallelConfig(sync="diloco")}, "precision", "use bf16"),
        ({"method": "full", "model": FOUR}, "model.quantize.bits", "cannot be trained"),
        ({"model": replace(FOUR, quantize=QuantizeConfig(5))}, "model.quantize.bits", "2, 3, 4, 6 or 8"),
        ({"model": replace(FOUR, quantize=QuantizeConfig(4, 48))}, "model.quantize.group_size", "32, 64 or 128"),
        ({"model": replace(FOUR, quantize=QuantizeConfig(None, 32))}, "model.quantize.group_size", "only means"),
        ({"train": TrainConfig(neftune_noise_alpha=0.0)}, "train.neftune_noise_alpha", "above 0"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], key: str, words: str) -> None:
    found = problems(**values)
    assert list(found) == [key]
    assert words in found[key]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_quantised_bases_take_adapters_in_any_precision(precision: str) -> None:
    assert not problems(precision=precision, model=FOUR)


def test_frozen_weights_follow_the_precision_and_trained_ones_are_read_as_they_are() -> None:
    stored = ModelConfig(path="org/model", dtype="float16")
    assert Config(stored).base == stored
    assert Config(FOUR, precision="bf16").base == replace(FOUR, dtype="bfloat16")
    assert Config(FOUR, precision="fp16", method="dora").base == replace(FOUR, dtype="float16")
    assert Config(ModelConfig(path="org/model"), precision="bf16", method="full").base.dtype is None
