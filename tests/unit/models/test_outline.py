from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_distributed.config.schema import LoraConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import build_scratch, prepare, train_tokenizer, wrap_tokenizer
from mlx_distributed.models.outline import describe
from mlx_distributed.models.random_state import random_key
from mlx_distributed.testing import SENTENCES

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "qwen3")
ARCH: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("tied", [True, False])
def test_parts_are_found(tied: bool) -> None:
    model, _ = build_scratch(ARCH | {"tie_word_embeddings": tied}, TOKENIZER, 0, lazy=True)
    outline = describe(model)
    assert (outline.layers, outline.num_layers, outline.tied) == ("model.layers", 3, tied)
    assert outline.embedding == ("model.embed_tokens",)
    assert outline.norm_and_head == ("model.norm",) if tied else ("lm_head", "model.norm")
    assert (outline.width, outline.dtypes, outline.draws) == (32, (mx.float32,) * 3, (0, 0, 0))


def test_parts_below_other_modules_are_found() -> None:
    arch = ARCH | {"num_key_value_heads": 4, "head_dim": 8, "sliding_window_pattern": 2}
    model, _ = build_scratch({"model_type": "gemma3", "text_config": arch, "vocab_size": 300}, TOKENIZER, 0, lazy=True)
    outline = describe(model)
    assert outline.layers == "language_model.model.layers"
    assert outline.norm_and_head == ("language_model.lm_head", "language_model.model.norm")


def test_draws_of_dropout_are_counted() -> None:
    model, _ = build_scratch(ARCH, TOKENIZER, 0)
    prepare(model, "lora", LoraConfig(dropout=0.1, num_layers=2, target_modules=("q_proj", "k_proj", "up_proj")), 0)
    assert describe(model).draws == (0, 0, 3)


def test_the_dtype_is_that_of_the_hidden_state() -> None:
    model, _ = build_scratch(ARCH, TOKENIZER, 0)
    model.set_dtype(mx.bfloat16)
    model.model.norm.set_dtype(mx.float32)
    assert describe(model).dtypes == (mx.bfloat16,) * 3


def test_describing_leaves_everything_as_it_was() -> None:
    model, _ = build_scratch(ARCH, TOKENIZER, 0)
    classes = [type(layer) for layer in model.layers]
    mx.random.seed(77)
    before = random_key()
    describe(model)
    assert random_key() == before
    assert [type(layer) for layer in model.layers] == classes
    assert not any(hasattr(layer, "probe") for layer in model.layers)
    assert not model.training


class Toy(nn.Module):
    """A model with one flaw."""

    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.model_type, self.flaw = "toy", flaw
        self.embed_tokens, self.norm, self.lm_head = nn.Embedding(8, 4), nn.RMSNorm(4), nn.Linear(4, 8)
        self.blocks = [Block(flaw) for _ in range(3)]
        if flaw == "unknown part":
            self.mixer = nn.Linear(4, 4)
        if flaw == "no embedding":
            self.embed_tokens = mx.eye(8, 4).__getitem__

    @property
    def layers(self) -> list[nn.Module]:
        return [nn.Linear(4, 4)] if self.flaw == "no list" else self.blocks

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.embed_tokens(tokens)
        per_token, mask = hidden, mx.ones((tokens.shape[1],) * 2, mx.bool_)
        order = {"backwards": self.blocks[::-1], "twice": self.blocks * 2, "left out": self.blocks[1:]}
        order |= {"stops early": self.blocks[:2]}
        for block in order.get(self.flaw, self.blocks):
            if self.flaw == "seeds":
                mx.random.seed(5)
            if self.flaw == "ids":
                hidden = block(tokens)
            elif self.flaw == "more arguments":
                hidden = block(hidden, mask, extra=per_token)
            else:
                hidden = block(
                    x=hidden, mask=mask, cache=(None, None), factor=mx.ones((tokens.shape[1], 1)), kind="causal"
                )
            if self.flaw == "changed":
                hidden = hidden * 2
            if self.flaw == "changed in place":
                hidden *= 2
            if self.flaw == "two results":
                hidden = hidden[0]
        if self.flaw == "does not run":
            raise ValueError("needs a picture")
        return self.lm_head(self.norm(hidden))


class Block(nn.Module):
    def __init__(self, flaw: str) -> None:
        super().__init__()
        self.flaw, self.linear = flaw, nn.Linear(4, 4)

    def __call__(self, x: mx.array, *_: object, **__: object) -> Any:
        y = self.linear(x)
        return {"two results": (y, y), "other shape": y[:, :3]}.get(self.flaw, y)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("no list", "its layers do not stand in one list"),
        ("unknown part", r"it is not known whether mixer.bias, mixer.weight is used before its layers"),
        ("no embedding", r"none of its parts is an embedding \(embed_in, embed_tokens, "),
        ("backwards", "it does not call its layers once each, in their order"),
        ("twice", "it does not call its layers once each, in their order"),
        ("left out", "it does not call its layers once each, in their order"),
        ("stops early", "it calls 2 of its 3 layers"),
        ("ids", "layer 0 is called with something else than a hidden state"),
        ("more arguments", "layer 0 is called with more than a hidden state and a mask"),
        ("changed", "what layer 0 returns is changed before layer 1 takes it"),
        ("changed in place", "what layer 0 returns is changed before layer 1 takes it"),
        ("two results", r"layer 0 returns something else than a hidden state \[B, L, D\]"),
        ("other shape", r"layer 0 returns something else than a hidden state \[B, L, D\]"),
        ("seeds", r"it does not run over a few tokens \(the random numbers have been seeded anew\)"),
        ("does not run", r"it does not run over a few tokens \(needs a picture\)"),
    ],
)
def test_what_cannot_be_cut_is_refused(flaw: str, message: str) -> None:
    with pytest.raises(
        ConfigError, match=f"^the architecture toy cannot be cut into pipeline stages: {message}.*; train it without"
    ):
        describe(Toy(flaw))


def test_what_has_no_flaw_is_not_refused() -> None:
    assert describe(Toy("none")).norm_and_head == ("lm_head", "norm")


class DropoutByToken(Block):
    """Draws for each token by itself, as adapters do below the loop of mamba."""

    def __call__(self, x: mx.array, *_: object, **__: object) -> mx.array:
        for _ in range(x.shape[1] if self.training else 0):
            mx.random.uniform()
        return x


def test_draws_that_depend_on_the_length_are_refused() -> None:
    model = Toy("none")
    model.blocks = [DropoutByToken("none") for _ in range(3)]
    with pytest.raises(ConfigError, match="how often its dropout draws random numbers depends on the length of a row"):
        describe(model)
