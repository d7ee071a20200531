"""Packed rows give the loss and the gradients that they give side by side, in every kind of model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig
from mlx_distributed.data.batch import Batch, collate, pack
from mlx_distributed.data.tokenize import Row
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import (
    Method,
    build_scratch,
    checkpoint_layers,
    isolate,
    layers,
    prepare,
    train_tokenizer,
    wrap_tokenizer,
)
from mlx_distributed.models.packed import packed
from mlx_distributed.models.random_state import random_key
from mlx_distributed.models.stages import cut
from mlx_distributed.testing import SENTENCES
from mlx_distributed.train.loss import summed_loss

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "qwen3")
ARCH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SLIDING,
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "gemma2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "cohere": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "logits_scaling": 8,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
GPT2: dict[str, Any] = {"n_ctx": 32, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}
LENGTHS = (5, 90, 9, 30, 6, 95, 17)
"""Two groups, of which the longest row is the longest of its own by far."""


def make_rows() -> list[Row]:
    random = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        loss_mask = random.random(length) < 0.7
        loss_mask[0] = False
        rows.append(Row(random.integers(0, 300, length).astype(np.int32), loss_mask))
    return rows


ROWS = make_rows()


def build(family: str, method: Method, **lora: Any) -> nn.Module:
    """Ready to take packed rows; adapters have an effect from the start."""
    model, _ = build_scratch({"model_type": family} | FAMILIES[family] | ARCH, TOKENIZER, 3)
    prepare(model, method, LoraConfig(rank=4, **lora), 5)
    for name, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))
    isolate(model)
    return model


def gradients(model: nn.Module, batch: Batch) -> tuple[float, dict[str, mx.array]]:
    """Loss per label token and its gradient."""
    parameters = model.trainable_parameters()

    def loss_of(values: dict[str, Any]) -> mx.array:
        model.update(values)
        return summed_loss(model, mx.array(batch.tokens), mx.array(batch.loss_mask)) / batch.num_labels

    mx.random.seed(7)
    with packed(model, batch.groups):
        loss, found = mx.value_and_grad(loss_of)(parameters)
    model.update(parameters)
    mx.eval(loss, found)
    return loss.item(), dict(tree_flatten(found))


def distance(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """Of whole gradients, relative."""
    assert found.keys() == expected.keys()
    apart = sum(mx.square(found[name] - expected[name]).sum().item() for name in expected)
    return float((apart / sum(mx.square(array).sum().item() for array in expected.values())) ** 0.5)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_same_loss_and_gradient(family: str, method: Method) -> None:
    model, batch = build(family, method), pack(ROWS, 8)
    assert batch.groups is not None
    assert len(batch.groups) == 2
    expected_loss, expected = gradients(model, collate(ROWS))
    loss, found = gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(found, expected) <= 1e-6
    # As one long row, in which attention looks at the rows before: what the test above must not let pass.
    _, leaked = gradients(model, Batch(batch.tokens, batch.loss_mask))
    assert distance(leaked, expected) >= 1e-2


@pytest.mark.parametrize("method", ["full", "dora"])
def test_a_quantised_base_and_gradient_checkpointing(method: Method) -> None:
    model, _ = build_scratch({"model_type": "qwen3"} | ARCH, TOKENIZER, 3)
    if method == "dora":
        nn.quantize(model, group_size=32, bits=8)
    prepare(model, method, LoraConfig(rank=4), 5)
    isolate(model)
    expected_loss, expected = gradients(model, collate(ROWS))
    loss, found = gradients(model, pack(ROWS))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(found, expected) <= 1e-6
    checkpoint_layers(model)
    again_loss, again = gradients(model, pack(ROWS))
    assert again_loss == loss
    assert all(mx.array_equal(again[name], found[name]) for name in found)


def test_dropout_is_repeated_and_draws_as_often_as_side_by_side() -> None:
    """So a stage of a pipeline can tell what was drawn before it, and a layer can be computed again."""
    model = build("qwen3", "lora", dropout=0.3)

    def run(batch: Batch) -> tuple[float, dict[str, mx.array], int]:
        return *gradients(model, batch), random_key()

    loss, found, key = run(pack(ROWS))
    checkpoint_layers(model)
    for again_loss, again, again_key in (run(pack(ROWS)), run(pack(ROWS))):
        assert (again_loss, again_key) == (loss, key)
        assert all(mx.array_equal(again[name], found[name]) for name in found)
    assert run(collate(ROWS))[2] == key
    model.eval()
    assert gradients(model, pack(ROWS))[0] != pytest.approx(loss, rel=1e-4)


def test_rows_of_a_group_and_of_other_groups_drop_out_differently() -> None:
    model = build("qwen3", "lora", dropout=0.5, target_modules=("q_proj", "v_proj"))
    row = ROWS[1]
    with packed(model, [[90], [90, 90]]):
        logits = model(mx.array(np.tile(row.tokens, 3)[None])).reshape(3, 90, -1)
    assert all(mx.abs(logits[one] - logits[other]).max() > 1e-3 for one, other in ((0, 1), (0, 2), (1, 2)))


def test_what_a_stage_computes_is_what_the_whole_model_does() -> None:
    batch = pack(ROWS)
    tokens = mx.array(batch.tokens[:, :-1])
    expected = None
    for edges in ((0, 2), (0, 1, 2)):
        value = tokens
        for span in pairwise(edges):
            model, _ = build_scratch({"model_type": "qwen3"} | ARCH, TOKENIZER, 3, lazy=True)
            prepare(model, "lora", LoraConfig(rank=4, dropout=0.3), 5, lazy=True)
            part = cut(model, *span)
            isolate(part)
            part.train()
            mx.random.seed(7)
            with packed(part, batch.groups):
                value = part(value)
        expected = value if expected is None else expected
        assert mx.array_equal(value, expected)


def test_isolating_changes_nothing_else() -> None:
    model, _ = build_scratch({"model_type": "qwen3"} | ARCH, TOKENIZER, 3)
    names = [name for name, _ in tree_flatten(model.parameters())]
    tokens = mx.array(collate(ROWS).tokens)
    expected = model(tokens)
    mx.random.seed(77)
    before = random_key()
    isolate(model)
    assert random_key() == before
    assert not model.training
    with packed(model, pack(ROWS).groups):
        pass
    assert mx.array_equal(model(tokens), expected)
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def gpt2() -> nn.Module:
    return build_scratch({"model_type": "gpt2", "layer_norm_epsilon": 1e-5} | GPT2, TOKENIZER, 0)[0]


class Flawed(nn.Module):
    """In place of the attention, or of the other half, of a layer."""

    def __init__(self, part: nn.Module, flaw: str) -> None:
        super().__init__()
        self.part, self.flaw = part, flaw

    def __call__(self, x: mx.array, *others: Any) -> Any:
        if self.flaw == "leak":
            return self.part(x, *others) + mx.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        if self.flaw == "error":
            raise ValueError("a reason")
        if self.flaw == "tuple":
            return self.part(x, *others), None
        return self.part(x, *others)


class Argument(nn.Module):
    """Calls the attention of a layer with one argument too many, or in another shape."""

    def __init__(self, layer: nn.Module, flaw: str) -> None:
        super().__init__()
        self.self_attn, self.flaw = layer.self_attn, flaw

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        if self.flaw == "shape":
            return x + self.self_attn(x[0], mask, cache)
        return x + self.self_attn(x, mask, mx.arange(x.shape[1]))


def flawed(flaw: str) -> nn.Module:
    model, _ = build_scratch({"model_type": "qwen3"} | ARCH, TOKENIZER, 0)
    layer: Any = layers(model)[1]
    if flaw == "leak":
        layer.mlp = Flawed(layer.mlp, flaw)
    elif flaw in ("tuple", "error"):
        layer.self_attn = Flawed(layer.self_attn, flaw)
    elif flaw == "name":
        layer.remix = layer.self_attn
        del layer["self_attn"]
    else:
        inner: Any = model
        inner.model.layers[1] = Argument(layer, flaw)
    return model


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("leak", "what it computes for a row depends on the row before"),
        ("name", r"layer 1 has no part that is known to mix tokens \(attention, attn,"),
        ("tuple", "its Flawed returns more than a hidden state"),
        ("error", r"it does not run over packed rows \(a reason\)"),
        ("argument", "its Attention is called with more than a hidden state and a mask"),
        ("shape", "its Attention is called without a hidden state"),
    ],
)
def test_models_whose_rows_cannot_be_isolated_are_refused(flaw: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"data.packing=true: rows of the architecture qwen3 .*{words}"):
        isolate(flawed(flaw))


def test_positions_that_are_counted_through_the_sequence_are_refused() -> None:
    with pytest.raises(ConfigError, match="depends on the place of the row in the sequence; train it without packing"):
        isolate(gpt2())
