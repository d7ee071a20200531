"""GGUF files, read back with the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.errors import CheckpointError, ConfigError
from mlx_distributed.models import load
from mlx_distributed.models.gguf import _LLAMA_3, describe_gguf, write_gguf
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.testing import tiny_model

NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", model_type="llama", tied=False)


def opened(folder: Path) -> tuple[dict[str, Any], TokenizerWrapper]:
    _, tokenizer, config = load(ModelConfig(path=str(folder)), lazy=True)
    return config, tokenizer


def write(folder: Path, file: Path, dtype: str) -> gguf.GGUFReader:
    config, tokenizer = opened(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    write_gguf(file, folder, config, describe_gguf(weights, config, tokenizer, dtype), dtype)
    return gguf.GGUFReader(file)


def unpermuted(array: np.ndarray, num_heads: int) -> np.ndarray:
    """From pairs of neighbouring rows, as llama.cpp rotates them, to halves."""
    shape = (num_heads, len(array) // num_heads // 2, 2, *array.shape[1:])
    return array.reshape(shape).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize(("dtype", "rtol"), [("f32", 0), ("f16", 2**-11)])
def test_tensors_are_equal_within_the_rounding_of_their_type(
    llama: Path, tmp_path: Path, dtype: str, rtol: float
) -> None:
    reader = write(llama, tmp_path / "m.gguf", dtype)
    stored = mx.load(str(llama / "model.safetensors"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(stored)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, array in stored.items():
        tensor = found[names.get_name(name, try_suffixes=(".weight",))]
        values = tensor.data.astype(np.float32)
        if match := {"q": 4, "k": 2}.get(name.removesuffix("_proj.weight")[-1]) if "self_attn" in name else None:
            values = unpermuted(values, match)
        assert tensor.tensor_type.name == ("F32" if array.ndim == 1 else dtype.upper())
        np.testing.assert_allclose(values, np.asarray(array), rtol=rtol, atol=2**-25 if rtol else 0)


def test_vocabulary_and_sizes_are_those_of_the_model(llama: Path, tmp_path: Path) -> None:
    reader = write(llama, tmp_path / "m.gguf", "f16")
    config, tokenizer = opened(llama)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert {text: id for id, text in enumerate(tokens)} == tokenizer.get_vocab()
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.merges"][0] == "a n"
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 1
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.key_length"] == config["head_dim"] == 8


def test_sentencepiece_scores_are_the_ranks_of_merges(llama: Path) -> None:
    """And rows of the embedding without a token are padding."""
    vocab = {"<unk>": 0, "<0x0A>": 1, "a": 2, "b": 3, "\u2581": 4, "ab": 5, "\u2581ab": 6}
    bpe = models.BPE(vocab, [("a", "b"), ("\u2581", "ab")], byte_fallback=True, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), unk_token="<unk>")
    tokenizer.add_tokens(["<call>"])
    config, _ = opened(llama)
    metadata = describe_gguf(NAMES, config | {"vocab_size": 10}, TokenizerWrapper(tokenizer), "f16")
    assert metadata["tokenizer.ggml.tokens"] == [*vocab, "<call>", "[PAD8]", "[PAD9]"]
    assert metadata["tokenizer.ggml.scores"].tolist() == [0, 0, 0, 0, 0, 0, -1, 0, 0, 0]
    assert metadata["tokenizer.ggml.token_type"].tolist() == [2, 6, 1, 1, 1, 1, 1, 4, 5, 5]
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.ggml.merges" not in metadata
    with pytest.raises(ConfigError, match="the tokenizer has 8 tokens, and the model 4"):
        describe_gguf(NAMES, config | {"vocab_size": 4}, TokenizerWrapper(tokenizer), "f16")


def with_pre_tokenizer(tokenizer: TokenizerWrapper, rule: dict[str, Any] | None) -> TokenizerWrapper:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    changed = Tokenizer.from_str(json.dumps(stored | {"pre_tokenizer": rule}))
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=changed))


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [SPLIT, BYTES | {"use_regex": False}]}, "llama-bpe"),
        ({"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}, None),
        (BYTES | {"add_prefix_space": True}, None),
        ({"type": "Whitespace"}, None),
        (None, None),
    ],
)
def test_the_rule_that_splits_words_is_named_or_refused(
    llama: Path, rule: dict[str, Any] | None, name: str | None
) -> None:
    config, tokenizer = opened(llama)
    tokenizer = with_pre_tokenizer(tokenizer, rule)
    if name is None:
        with pytest.raises(ConfigError, match="splits words by a rule that has no name here"):
            describe_gguf(NAMES, config, tokenizer, "f16")
    else:
        assert describe_gguf(NAMES, config, tokenizer, "f16")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"model_type": "qwen3"}, NAMES[0], "the model is a qwen3, and GGUF can be written of llama and mistral"),
        ({"quantization": {"bits": 4}}, NAMES[0], "quantised by MLX, which GGUF does not know; add --dequantize"),
        ({}, "model.layers.0.self_attn.q_proj.bias", "q_proj.bias has no name in the GGUF of a llama"),
        ({}, "model.layers.0.block_sparse_moe.gate.weight", "gate.weight has no name"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, NAMES[0], 'rope_scaling={"rope_type": "llama3"'),
    ],
)
def test_what_would_be_lost_is_refused(llama: Path, change: dict[str, Any], name: str, words: str) -> None:
    config, tokenizer = opened(llama)
    with pytest.raises(ConfigError, match=words):
        describe_gguf([*NAMES, name], config | change, tokenizer, "f16")


def test_another_kind_of_tokenizer_is_refused(llama: Path) -> None:
    config, _ = opened(llama)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ConfigError, match="a WordLevel tokenizer cannot be written"):
        describe_gguf(NAMES, config, TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words)), "f16")


def test_a_tokenizer_without_a_file_is_refused(llama: Path) -> None:
    config, _ = opened(llama)
    with pytest.raises(ConfigError, match=r"the model has no tokenizer\.json"):
        describe_gguf(NAMES, config, TokenizerWrapper(ByT5Tokenizer()), "f16")


def test_what_f16_has_no_number_for_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "llama", model_type="llama")
    arrays = mx.load(str(folder / "model.safetensors"))
    mx.eval(arrays)
    arrays["model.embed_tokens.weight"] *= 1e6
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has values that f16 has no number for"):
        write(folder, tmp_path / "m.gguf", "f16")
