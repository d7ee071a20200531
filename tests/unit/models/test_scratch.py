from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_distributed.errors import ConfigError
from mlx_distributed.models import build_scratch, train_tokenizer, wrap_tokenizer
from mlx_distributed.testing import SENTENCES

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "qwen3")
ARCH: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100_000,
}
TOKENS = mx.array([[5, 17, 250, 9, 31, 77, 123, 40, 201, 8]])


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen2"])
def test_what_is_safe_is_filled_in(model_type: str) -> None:
    model, config = build_scratch(ARCH | {"model_type": model_type}, TOKENIZER, 0)
    assert config["vocab_size"] == len(TOKENIZER) == 300
    assert (config["num_key_value_heads"], config["rms_norm_eps"]) == (4, 1e-6)
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)
    assert model.layers[0].self_attn.q_proj.weight.shape == (64, 64)
    assert "lm_head" not in model
    assert model(TOKENS).shape == (1, 10, 300)
    assert not model.training


def test_what_is_given_wins() -> None:
    given = {"head_dim": 32, "rope_theta": 500, "num_key_value_heads": 1, "tie_word_embeddings": False}
    model, config = build_scratch(ARCH | given, TOKENIZER, 0)
    assert config | given == config
    assert model.lm_head.weight.shape == (300, 64)
    assert model.layers[0].self_attn.k_proj.weight.shape == (32, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_follow_the_seed_and_start_near_guessing(tied: bool) -> None:
    models = [build_scratch(ARCH | {"tie_word_embeddings": tied}, TOKENIZER, seed)[0] for seed in (3, 3, 4)]
    same, again, other = (model(TOKENS) for model in models)
    assert mx.array_equal(same, again)
    assert not mx.array_equal(same, other)
    loss = nn.losses.cross_entropy(same[:, :-1], TOKENS[:, 1:], reduction="mean").item()
    assert loss == pytest.approx(math.log(300), abs=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen33"}, r"model_type='qwen33' is not an architecture of mlx-lm \(did you mean qwen3\?\)"),
        ({"model_type": "transformer-9000"}, "is not an architecture of mlx-lm; use for example qwen3 or llama"),
        ({"model_type": None}, "model_type=None is not an architecture"),
        ({"model_type": "cache"}, "model_type='cache' is not a model"),
        ({"num_hidden_layer": 2}, r"does not read: num_hidden_layer \(did you mean num_hidden_layers\?\)$"),
        ({"num_hidden_layer": 2, "bos_token_id": 1}, r"num_hidden_layer .*, bos_token_id$"),
        ({"num_key_value_heads": 3}, "does not make a qwen3 model: "),
        ({"num_hidden_layers": 0}, "does not make a qwen3 model: "),
        ({"hidden_size": "wide"}, "lacks head_dim, which mlx-lm's qwen3 needs"),
        ({"hidden_size": "wide", "head_dim": 16}, "does not make a qwen3 model: "),
        ({"hidden_size": 63}, "lacks head_dim, which"),
        ({"num_attention_heads": 0}, "lacks num_key_value_heads, head_dim, which"),
    ],
)
def test_what_makes_no_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_scratch(ARCH | changes, TOKENIZER, 0)


def test_all_missing_keys_are_named() -> None:
    with pytest.raises(
        ConfigError, match="lacks hidden_size, num_hidden_layers, intermediate_size, num_attention_heads"
    ):
        build_scratch({"model_type": "llama"}, TOKENIZER, 0)


def test_other_names_of_an_architecture_work() -> None:
    assert build_scratch(ARCH | {"model_type": "mistral"}, TOKENIZER, 0)[0].model_type == "mistral"
