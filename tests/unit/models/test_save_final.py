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
from mlx_distributed.models import Method, checkpoint_layers, load, prepare, save, save_final, trainable
from mlx_distributed.models.upstream import load_folder, make_shards
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


def test_files_are_those_that_mlx_lm_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of the arrays in them."""
    from mlx_lm.utils import save_model

    monkeypatch.setattr(save, "make_shards", lambda weights: make_shards(weights, 0))  # one array each
    model = train_and_save(tiny_model(tmp_path / "base"), tmp_path / "final", "full", LoraConfig())
    loaded, _ = load_folder(str(tmp_path / "final"))
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    monkeypatch.setattr("mlx_lm.utils.make_shards", lambda weights: make_shards(weights, 0))
    save_model(tmp_path / "theirs", model)
    names = [sorted(path.name for path in (tmp_path / name).glob("model*")) for name in ("final", "theirs")]
    assert names[0] == names[1]
    index, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("final", "theirs")
    )
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_trained_may_come_one_by_one(tmp_path: Path, method: Method) -> None:
    source, folder = ModelConfig(path=str(tiny_model(tmp_path / "base"))), tmp_path / "final"
    whole = train_and_save(Path(str(source.path)), tmp_path / "whole", method, LoraConfig())
    model, tokenizer, config = load(source, lazy=True)
    prepare(model, method, LoraConfig(), 0, lazy=True)
    arrays = iter(trainable(whole).values())
    save_final(folder, model, tokenizer, config, source=source, method=method, lora=LoraConfig(), trained=arrays)
    for file in (tmp_path / "whole").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


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
