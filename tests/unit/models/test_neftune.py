from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_distributed.config.schema import LoraConfig, ModelConfig, QuantizeConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import add_noise, isolate, load, prepare
from mlx_distributed.models.packed import packed
from mlx_distributed.models.random_state import random_key
from mlx_distributed.models.stages import cut

ALPHA = 5.0
TOKENS = mx.array([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]])


def noise(model: nn.Module, tokens: mx.array = TOKENS, seed: int = 3) -> np.ndarray:
    """That is added to the embeddings of tokens, [B, L, D]."""
    embedding = model.model.embed_tokens
    mx.random.seed(seed)
    noisy = embedding(tokens)
    model.eval()
    plain = embedding(tokens)
    model.train()
    return np.asarray((noisy - plain).astype(mx.float32))


@pytest.mark.parametrize("quantize", [QuantizeConfig(), QuantizeConfig(8, 32)], ids=["plain", "quantised"])
def test_noise_is_uniform_within_its_bound_in_training_alone(tiny: Path, quantize: QuantizeConfig) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny), quantize=quantize))
    prepare(model, "lora", LoraConfig(), seed=0)
    head = model.model.embed_tokens.as_linear(mx.ones((1, 32)))
    add_noise(model, ALPHA)
    found, bound = noise(model), ALPHA / np.sqrt(7 * 32)
    assert 0.9 * bound < np.abs(found).max() <= bound * (1 + 1e-5)
    assert abs(found.mean()) < 0.1 * bound
    assert found.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert np.array_equal(found, noise(model))
    assert not np.array_equal(found, noise(model, seed=4))
    assert mx.array_equal(model.model.embed_tokens.as_linear(mx.ones((1, 32))), head)


def test_packed_rows_have_the_noise_of_their_length(tiny: Path) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny)))
    prepare(model, "full", LoraConfig(), seed=0)
    isolate(model)
    add_noise(model, ALPHA)
    with packed(model, [[2, 3], [9]]):
        found = np.abs(noise(model, mx.arange(14)[None])[0])
    for start, stop in ((0, 2), (2, 5), (5, 14)):
        bound = ALPHA / np.sqrt((stop - start) * 32)
        assert 0.8 * bound < found[start:stop].max() <= bound * (1 + 1e-5)


def test_dropout_draws_what_it_draws_without_noise(tiny: Path) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny)))
    prepare(model, "lora", LoraConfig(dropout=0.3), seed=0)
    keys = []
    for add in (lambda: None, lambda: add_noise(model, ALPHA)):
        add()
        mx.random.seed(1)
        model(TOKENS)
        keys.append(random_key())
    assert keys[0] == keys[1]


def test_later_stages_add_none_and_what_is_not_known_is_refused(tiny: Path) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny)), lazy=True)
    prepare(model, "full", LoraConfig(), seed=0, lazy=True)
    last = cut(model, 1, 2)
    add_noise(last, ALPHA)
    assert not noise(last).any()
    with pytest.raises(ConfigError, match="Linear has 0 parts that are known to embed tokens"):
        add_noise(nn.Linear(2, 2), ALPHA)
