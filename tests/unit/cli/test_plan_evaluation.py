from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_distributed.cli.plan.evaluation import Evaluation
from mlx_distributed.cli.plan.work import Model, Shape
from mlx_distributed.config.schema import LoraConfig
from mlx_distributed.evaluate.generate import generate
from mlx_distributed.models import build_scratch, compute_in, prepare, train_tokenizer, wrap_tokenizer
from mlx_distributed.models.precision import Precision
from mlx_distributed.testing import SENTENCES
from mlx_distributed.train.evaluation import evaluating
from mlx_distributed.train.loss import summed_loss

ARCH = {
    "model_type": "qwen3",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
NUM_ROWS, NUM_TOKENS = 8, 97
GRID = (Shape(NUM_ROWS, NUM_TOKENS - 1, keep=False, checkpointed=False),)


def build(precision: Precision) -> nn.Module:
    tokenizer = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "qwen3")
    model, _ = build_scratch(ARCH, tokenizer, 0)
    prepare(model, "full", LoraConfig(), 0)
    compute_in(model, precision)
    mx.eval(model.parameters())
    return model


def peak_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with evaluating(model):
        run()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_is_foretold(precision: Precision) -> None:
    model = build(precision)
    tokens = mx.ones((NUM_ROWS, NUM_TOKENS), mx.int32)
    mask = mx.ones(tokens.shape, mx.bool_)
    mx.eval(tokens, mask)
    loss = peak_bytes(model, lambda: mx.eval(summed_loss(model, tokens, mask)))
    answers = peak_bytes(model, lambda: generate(model, [[1] * NUM_TOKENS] * NUM_ROWS, 2, ()))
    whole = Model(model)
    assert Evaluation(GRID, (), 2).peak_bytes(whole.stage()) == pytest.approx(loss, rel=0.2)
    assert Evaluation((), GRID, 2).peak_bytes(whole.stage()) == pytest.approx(answers, rel=0.2)


def test_caches_grow_with_answers() -> None:
    model = Model(build("fp32"))
    num_bytes = 4 * 2 * 2 * 32 * 4 * NUM_ROWS  # Of a token: layers, keys and values, heads, their width, float32.
    room = 3328  # For 3096 tokens: a multiple of 256.
    assert Evaluation((), GRID, 3000).peak_bytes(model.stage()) == num_bytes * room


def test_nothing_is_evaluated() -> None:
    assert Evaluation((), (), 2).peak_bytes(Model(build("fp32")).stage()) == 0
