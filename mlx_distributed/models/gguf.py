"""GGUF files of llama and mistral models, written by MLX with the names and the layout that mlx-lm gives tensors.

Tokens, merges and scores are written here: mlx-lm (0.32.2) calls every tokenizer SentencePiece and gives all its tokens
one score, which readers cannot split a text with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distributed.errors import CheckpointError, ConfigError
from mlx_distributed.models.upstream import (
    TokenizerWrapper,
    permute_weights,
    prepare_metadata,
    translate_weight_names,
)

GGUF_DTYPES = {"f16": mx.float16, "f32": mx.float32}
"""By the names of GGUF; MLX (0.32) cannot write bf16."""
_FILE_TYPES = {"f32": 0, "f16": 1}
_ARCHITECTURES = ("llama", "mistral")
_TENSOR = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(q|k|v|output|norm)|ffn_(gate|up|down|norm)))\.weight"
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class _Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a model, as `prepare_metadata` asks for them."""

    tokens: tuple[tuple[str, float, _Kind], ...]
    tokenizer: TokenizerWrapper

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def all_tokens(self) -> Iterator[tuple[str, float, _Kind]]:
        return iter(self.tokens)


def describe_gguf(
    names: Iterable[str], config: Mapping[str, Any], tokenizer: TokenizerWrapper, dtype: str
) -> dict[str, Any]:
    """All of a GGUF file but its tensors.

    Args:
        names: of all parameters.
        config: architecture.
        tokenizer: of the model.
        dtype: one of `GGUF_DTYPES`.

    Raises:
        ConfigError: the model or its tokenizer has something that cannot be written.
    """
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise ConfigError(
            f"--gguf: the model is a {model_type}, and GGUF can be written of {' and '.join(_ARCHITECTURES)} alone; "
            "leave --gguf out, and convert the exported folder with convert_hf_to_gguf.py of llama.cpp"
        )
    if "quantization" in config:
        raise ConfigError("--gguf: the model is quantised by MLX, which GGUF does not know; add --dequantize")
    if unnamed := [name for name in names if not _TENSOR.fullmatch(translate_weight_names(name))]:
        raise ConfigError(f"--gguf: {unnamed[0]} has no name in the GGUF of a {model_type}; leave --gguf out")
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type", "default")) not in ("default", "linear"):
        raise ConfigError(
            f"--gguf: the positions of the model are scaled by rope_scaling={json.dumps(scaling)}, which mlx-lm does "
            "not write; leave --gguf out, and convert the exported folder with convert_hf_to_gguf.py of llama.cpp"
        )
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise ConfigError("--gguf: the model has no tokenizer.json, whose tokens could be written; leave --gguf out")
    stored = json.loads(backend.to_str())
    metadata = prepare_metadata(dict(config), _Vocabulary(_tokens(stored, int(config["vocab_size"])), tokenizer))
    metadata["general.file_type"] = mx.array(_FILE_TYPES[dtype], mx.uint32)
    if config.get("head_dim"):
        for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
            metadata[f"llama.{name}"] = mx.array(config["head_dim"], mx.uint32)
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if not stored["model"].get("byte_fallback"):
        metadata["tokenizer.ggml.model"] = "gpt2"
        metadata["tokenizer.ggml.pre"] = _pre_tokenizer(stored["pre_tokenizer"])
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(stored)]
    return metadata


def write_gguf(file: Path, folder: Path, config: Mapping[str, Any], metadata: Mapping[str, Any], dtype: str) -> None:
    """Write the weights of a model folder as GGUF: matrices in `dtype`, norms in float32. All are in memory at once.

    Raises:
        CheckpointError: a weight is too large for the dtype.
        RuntimeError: the file cannot be written.
    """
    heads = {"q": config["num_attention_heads"]}
    heads["k"] = config.get("num_key_value_heads", heads["q"])
    arrays = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored = mx.load(str(path))
        assert isinstance(stored, dict)
        for name, array in stored.items():
            if match := re.search(r"self_attn\.([qk])_proj\.weight", name):
                array = permute_weights(array, heads["q"], heads[match[1]])
            written = array.astype(mx.float32 if array.ndim == 1 else GGUF_DTYPES[dtype])
            if not mx.isfinite(written).all():
                raise CheckpointError(f"{name} has values that {dtype} has no number for; use --gguf f32")
            arrays[translate_weight_names(name)] = written
    mx.save_gguf(str(file), arrays, dict(metadata))


def _tokens(stored: Mapping[str, Any], num_tokens: int) -> tuple[tuple[str, float, _Kind], ...]:
    """Text, score and kind of each row of the embedding. The score is the rank of the merge that makes the token."""
    if stored["model"]["type"] != "BPE":
        raise ConfigError(f"--gguf: a {stored['model']['type']} tokenizer cannot be written; leave --gguf out")
    scores = {"".join(pair): -float(rank) for rank, pair in enumerate(_merges(stored))}
    unknown = stored["model"].get("unk_token")
    tokens = {id: (f"[PAD{id}]", 0.0, _Kind.UNUSED) for id in range(num_tokens)}
    for text, id in stored["model"]["vocab"].items():
        kind = _Kind.BYTE if _BYTE.fullmatch(text) else _Kind.UNKNOWN if text == unknown else _Kind.NORMAL
        tokens[id] = (text, scores.get(text, 0.0), kind)
    for added in stored["added_tokens"]:
        if added["content"] != unknown:
            kind = _Kind.CONTROL if added["special"] else _Kind.USER_DEFINED
            tokens[added["id"]] = (added["content"], 0.0, kind)
    if len(tokens) != num_tokens:
        raise ConfigError(f"--gguf: the tokenizer has {len(tokens)} tokens, and the model {num_tokens}; leave it out")
    return tuple(tokens[id] for id in range(num_tokens))


def _merges(stored: Mapping[str, Any]) -> list[list[str]]:
    """Pairs, which older files write as one text."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in stored["model"]["merges"]]


def _pre_tokenizer(found: Mapping[str, Any] | None) -> str:
    """What llama.cpp calls the rule by which a byte-level tokenizer splits a text into words."""
    steps = [dict(step) for step in (found or {}).get("pretokenizers", [found or {}])]
    *before, last = steps
    splits = last.get("use_regex", True)
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not before and splits:
            return "gpt-2"
        if before == [{"type": "Digits", "individual_digits": True}] and splits:
            return "smollm"
        if len(before) == 1 and before[0].get("pattern") == {"Regex": _LLAMA_3} and not splits:
            return "llama-bpe"
    raise ConfigError(
        "--gguf: the tokenizer splits words by a rule that has no name here, and a reader would split them otherwise; "
        "leave --gguf out, and convert the exported folder with convert_hf_to_gguf.py of llama.cpp"
    )
