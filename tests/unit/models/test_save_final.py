from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models import Method, checkpoint_layers, load, prepare, save_final
from mlx_distributed.models.upstream import load_folder
from mlx_distributed.testing import tiny_model

TOKENS = mx.arange(24).reshape(2, 12)


def train_and_save(base: Path, folder: Path, method: Method, lora: LoraConfig, *, trust: bool = False) -> nn.Module:
    """A model whose trained parameters have all moved, saved to `folder`; returned in evaluation mode."""
    source = ModelConfig(path=str(base), trust_remote_code=trust)
    model, tokenizer, config = load(source)
    prepare(model, method, lora, 0)
    checkpoint_layers(model)
    moved = tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.trainable_parameters())
    model.update(moved)
    save_final(folder, model, tokenizer, config, source=source, method=method, lora=lora)
    model.eval()
    return model


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_full_model_loads_unchanged_in_mlx_lm(tmp_path: Path, model_type: str, tied: bool) -> None:
    base = tiny_model(tmp_path / "base", model_type=model_type, tied=tied)
    model = train_and_save(base, tmp_path / "final", "full", LoraConfig())
    shutil.rmtree(base)
    loaded, tokenizer = load_folder(str(tmp_path / "final"))
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    assert tokenizer.decode(tokenizer.encode("Write 324 in words.")) == "Write 324 in words."
    assert tokenizer.has_chat_template
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("lora", LoraConfig(dropout=0.1)),
        ("lora", LoraConfig(rank=3, scale=5.0, num_layers=1, target_modules=("q_proj", "mlp.up_proj"))),
        ("dora", LoraConfig(alpha=4.0)),
    ],
)
def test_an_adapter_loads_in_mlx_lm(tmp_path: Path, method: Method, lora: LoraConfig) -> None:
    base = tiny_model(tmp_path / "base", num_layers=3)
    model = train_and_save(base, tmp_path / "final", method, lora)
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    config = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert (config["model"], config["fine_tune_type"]) == (str(base), method)
    assert config["num_layers"] == (1 if lora.num_layers == 1 else 3)
    loaded, _ = load_folder(config["model"], adapter_path=str(tmp_path / "final"))
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    assert not mx.allclose(loaded(TOKENS), load_folder(str(base))[0](TOKENS), atol=1e-3)


def test_code_and_generation_settings_of_the_model_come_along(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    (base / "own.py").write_text("from mlx_lm.models.qwen3 import Model, ModelArgs\n")
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_file": "own.py"}))
    train_and_save(base, tmp_path / "final", "full", LoraConfig(), trust=True)
    _, tokenizer = load_folder(str(tmp_path / "final"), trust_remote_code=True)
    assert tokenizer.eos_token_ids == {0, 2}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_older_folder_is_replaced(tiny: Path, tmp_path: Path, method: Method) -> None:
    folder = tmp_path / "out" / "final"
    for leftover in ("final", ".final.partial", ".final.replaced"):
        (tmp_path / "out" / leftover).mkdir(parents=True)
        (tmp_path / "out" / leftover / "old").touch()
    train_and_save(tiny, folder, method, LoraConfig())
    assert not (folder / "old").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_full_disk_keeps_what_was_there(tiny: Path, tmp_path: Path, method: Method) -> None:
    folder = tmp_path / "final"
    train_and_save(tiny, folder, method, LoraConfig())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"final could not be written \(.*\); free some space"):
            train_and_save(tiny, folder, method, LoraConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
