from __future__ import annotations

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig
from mlx_distributed.models import Method, build_scratch, prepare, train_tokenizer, wrap_tokenizer
from mlx_distributed.models.costs import Cost, costs
from mlx_distributed.models.stages import cut
from mlx_distributed.testing import SENTENCES

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "llama")
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
ARCH = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_parts_are_counted() -> None:
    model, _ = build_scratch(ARCH | {"tie_word_embeddings": False}, TOKENIZER, 0, lazy=True)
    prepare(model, "full", LoraConfig(), 0, lazy=True)
    counted = costs(model)
    assert counted.embedding == Cost(300 * 64, 300 * 64, 4 * 300 * 64)
    assert counted.layers == (Cost(LAYER, LAYER, 4 * LAYER),) * 3
    assert counted.head == Cost(301 * 64, 301 * 64, 4 * 301 * 64)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 2), (1, 3), (0, 3)])
def test_a_stage_weighs_what_was_foretold(tied: bool, method: Method, start: int, stop: int) -> None:
    model, _ = build_scratch(ARCH | {"tie_word_embeddings": tied}, TOKENIZER, 0, lazy=True)
    prepare(model, method, LoraConfig(num_layers=2), 0, lazy=True)
    foretold = costs(model).stage(start, stop)
    stage = cut(model, start, stop)
    arrays = dict(tree_flatten(stage.parameters())).values()
    num_trainable = sum(array.size for array in dict(tree_flatten(stage.trainable_parameters())).values())
    assert foretold == Cost(sum(a.size for a in arrays), num_trainable, sum(a.nbytes for a in arrays))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_values_are_counted_one_by_one(bits: int) -> None:
    model, _ = build_scratch(ARCH, TOKENIZER, 0)
    plain = costs(model)
    nn.quantize(model, group_size=64, bits=bits)
    packed = costs(model)
    assert packed.embedding.num_parameters == plain.embedding.num_parameters
    assert [cost.num_parameters for cost in packed.layers] == [LAYER] * 3
    assert packed.embedding.num_bytes == 300 * 64 * bits // 8 + 300 * 2 * 4
