from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import (
    build_scratch,
    load,
    prepare,
    read_tokenizer,
    train_tokenizer,
    trainable,
    wrap_tokenizer,
)
from mlx_distributed.models.upstream import save_config
from mlx_distributed.testing import SENTENCES, tiny_model

TOKENS = mx.arange(24).reshape(2, 12)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def quantised(folder: Path, target: Path, bits: int) -> Path:
    from mlx_lm.utils import quantize_model, save_model  # after `models.upstream`, which keeps the process as it is

    shutil.copytree(folder, target)
    model, _, config = load(ModelConfig(path=str(folder)))
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_tiny_model_is_read_as_it_was_built(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = tiny_model(tmp_path / "model", model_type=model_type, tied=tied, num_layers=3, seed=4)
    model, tokenizer, config = load(ModelConfig(path=str(folder)))
    built, again = build_scratch({key: config[key] for key in config if not key.endswith("_id")}, tokenizer, 4)
    assert config == again
    assert len(model.layers) == 3
    assert not model.training
    assert mx.array_equal(model(TOKENS), built(TOKENS))
    fresh = wrap_tokenizer(train_tokenizer(SENTENCES, 300), model_type)
    text = "<|im_start|>user\n12 e\u0301  don't\n\n!<|im_end|>"
    assert tokenizer.encode(text) == fresh.encode(text)
    assert tokenizer.chat_template == fresh.chat_template
    assert tokenizer.eos_token_ids == {2}


def test_a_local_folder_needs_no_network(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"network used: {args}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(ModelConfig(path=str(tiny)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast(tiny: Path, dtype: str) -> None:
    model, _, _ = load(ModelConfig(path=str(tiny), dtype=dtype))
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {getattr(mx, dtype)}
    prepare(model, "lora", LoraConfig(), 0)
    assert {array.dtype for array in trainable(model).values()} == {mx.float32}
    assert model(TOKENS).dtype == getattr(mx, dtype)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_trains(tmp_path: Path, method: str, bits: int) -> None:
    plain = tiny_model(tmp_path / "plain", hidden_size=64)
    model, _, _ = load(ModelConfig(path=str(quantised(plain, tmp_path / "packed", bits)), dtype="float32"))
    packed = model.layers[0].mlp.up_proj
    assert packed.weight.dtype == mx.uint32
    prepare(model, method, LoraConfig(dropout=0.1), 0)

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="sum")

    value, gradients = nn.value_and_grad(model, loss)(TOKENS)
    norms = {name: mx.linalg.norm(gradient).item() for name, gradient in tree_flatten(gradients)}
    assert 0 < value.item() < float("inf")
    assert len(norms) == len(trainable(model))
    for name, norm in norms.items():  # lora_b starts at zero, so nothing reaches lora_a yet
        assert norm == 0 if name.endswith("lora_a") else 0 < norm < float("inf")


def test_full_refuses_a_quantised_model(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "plain", hidden_size=64)
    model, _, _ = load(ModelConfig(path=str(quantised(plain, tmp_path / "packed", 4))))
    with pytest.raises(ConfigError, match=r"method=full cannot train quantised weights \(.* is uint32\); use lora"):
        prepare(model, "full", LoraConfig(), 0)


def test_dora_refuses_what_mlx_lm_packs_unevenly(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "plain", hidden_size=64)
    model, _, _ = load(ModelConfig(path=str(quantised(plain, tmp_path / "packed", 6))))
    with pytest.raises(ConfigError, match=r"method=dora cannot adapt mlp\.down_proj.*; use lora"):
        prepare(model, "dora", LoraConfig(), 0)
    prepare(model, "lora", LoraConfig(), 0)


def test_a_hub_model_is_read_from_the_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--somebody--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(copy, cached / "snapshots" / commit)
    model, _, _ = load(ModelConfig(path="somebody/tiny"))
    assert len(model.layers) == 2


def test_a_hub_model_without_a_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"model\.path=somebody/none .*check the name, model\.revision and the network"
    ):
        load(ModelConfig(path="somebody/none"))


@pytest.mark.parametrize("path", ["no-such-folder", "./a", "/a/b", "a/b/c", "-a/b"])
def test_a_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; give a folder with config\.json"):
        load(ModelConfig(path=path))


def test_a_file_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; give the folder"):
        load(ModelConfig(path=str(tiny / "config.json")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"has no config\.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "does not say `model_type`"),
        ("config.json", '{"model_type": "quen3"}', "cannot be loaded by mlx-lm: Model type quen3 not supported"),
        ("config.json", '{"model_type": "qwen3"}', "cannot be loaded by mlx-lm: .*missing.*hidden_size"),
        ("model.safetensors", None, r"has no weights: mlx-lm reads files named model\*\.safetensors"),
        ("model.safetensors", "torn", "cannot be loaded by mlx-lm"),
        ("tokenizer.json", "torn", "cannot be loaded by mlx-lm: .*tokenizer"),
    ],
)
def test_a_broken_folder_is_refused(copy: Path, name: str, content: str | None, message: str) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig(path=str(copy)))


def test_weights_of_another_size_are_refused(copy: Path) -> None:
    edit_config(copy, hidden_size=64)
    with pytest.raises(ConfigError, match=r"cannot be loaded by mlx-lm: .*shape"):
        load(ModelConfig(path=str(copy)))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter; give the model that it was trained on"):
        load(ModelConfig(path=str(tmp_path)))


def test_code_of_a_model_runs_only_where_it_is_trusted(copy: Path) -> None:
    (copy / "own.py").write_text("from mlx_lm.models.qwen3 import Model, ModelArgs\n")
    edit_config(copy, model_file="own.py")
    with pytest.raises(ConfigError, match=r"custom module \('own\.py'\)"):
        load(ModelConfig(path=str(copy)))
    model, _, _ = load(ModelConfig(path=str(copy), trust_remote_code=True))
    assert len(model.layers) == 2


def test_a_tokenizer_without_its_model(copy: Path) -> None:
    _, expected, _ = load(ModelConfig(path=str(copy)))
    for weights in copy.glob("model*"):
        weights.unlink()
    tokenizer = read_tokenizer(ModelConfig(path=str(copy)))
    assert tokenizer.encode("a <|im_end|>") == expected.encode("a <|im_end|>")
    assert tokenizer.chat_template == expected.chat_template


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_a_folder_without_a_tokenizer_is_refused(copy: Path, model_type: str) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    edit_config(copy, model_type=model_type)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        read_tokenizer(ModelConfig(path=str(copy)))
