from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.evaluate import generate as module
from mlx_distributed.evaluate.generate import generate
from mlx_distributed.models import load, prepare
from mlx_distributed.testing import tiny_model

PROMPTS = [[random.Random(n).randrange(3, 300) for _ in range(1 + n % 4)] for n in range(14)]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tiny_model(tmp_path_factory.mktemp("generate") / "model", model_type=request.param, tied=False)
    return load(ModelConfig(path=str(folder)))[0]


def slowly(model: nn.Module, prompt: list[int], max_new_tokens: int, stop_tokens: set[int]) -> list[int]:
    """One prompt, the whole sequence computed anew for every token."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        token = mx.argmax(model(mx.array([tokens]))[0, -1]).item()
        if token in stop_tokens:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("max_batch_size", [64, 3])
def test_answers_are_those_of_one_prompt_at_a_time(
    model: nn.Module, max_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_SIZE", max_batch_size)
    free = [slowly(model, prompt, 9, set()) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 9, ()) == free
    stop_tokens = {free[0][2], free[1][0], free[5][8]}
    stopped = [slowly(model, prompt, 9, stop_tokens) for prompt in PROMPTS]
    assert stopped != free
    assert any(stopped)
    assert generate(model, PROMPTS, 9, stop_tokens) == stopped
    assert [generate(model, [prompt], 9, stop_tokens)[0] for prompt in PROMPTS] == stopped


def test_a_batch_ends_when_all_its_rows_have(model: nn.Module) -> None:
    first = slowly(model, [7, 8], 1, set())
    assert generate(model, [[7, 8]], 10**9, set(first)) == [[]]


def test_nothing_asked_nothing_generated(model: nn.Module) -> None:
    assert generate(model, [], 5, {2}) == []
    assert generate(model, [[4], [5, 6]], 0, {2}) == [[], []]


def test_dropout_is_off_meanwhile(tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(tiny_model(tmp_path / "model"))))[0]
    prepare(model, "lora", LoraConfig(dropout=0.9), 0)
    for layer in model.layers:
        layer.mlp.up_proj.lora_b = mx.random.normal(layer.mlp.up_proj.lora_b.shape)
    answers = generate(model, PROMPTS, 5, {2})
    assert model.training
    assert model.layers[0].mlp.up_proj.dropout.training
    model.eval()
    assert generate(model, PROMPTS, 5, {2}) == answers
    assert not model.training
