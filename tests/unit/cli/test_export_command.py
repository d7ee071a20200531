"""`mlx-distributed export` as it is typed: what it writes loads in mlx-lm, and what is refused leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx_lm import generate
from mlx_lm.fuse import main as mlx_lm_fuse
from mlx_lm.utils import quantize_model, save
from support import train_all, write_rows

from mlx_distributed.cli.distributed import main
from mlx_distributed.models.tokenizer import CHAT_TEMPLATE
from mlx_distributed.models.upstream import load_folder
from mlx_distributed.testing import tiny_model
from mlx_distributed.train.checkpoint import best, newest_valid

TOKENS = mx.arange(24).reshape(2, 12)
STEPS = 3
QUANTISED = ["model.quantize.bits=4", "model.quantize.group_size=32", "precision=bf16"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of runs: `lora` on a llama, `dora` on one with bfloat16, `qlora` on a quantised one, `quantised` on
    one that is quantised as it is loaded, and all of a llama in two `staged` halves."""
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "rows.jsonl")
    base = tiny_model(folder / "llama", model_type="llama", hidden_size=64)
    model, tokenizer, config = load_folder(str(base), return_config=True)
    model, config = quantize_model(model, config, 32, 4)
    save(folder / "llama-4bit", str(base), model, tokenizer, config)
    (folder / "own.jinja").write_text(CHAT_TEMPLATE.replace("These", "Those"))
    settings = {
        "model": {"path": "llama"},
        "data": {"train": "rows.jsonl", "val_fraction": 0.2},
        "train": {"global_batch_size": 4, "micro_batch_size": 4, "max_steps": STEPS, "device": "cpu"},
        "eval": {"at_start": True, "steps": 1},
        "optimizer": {"learning_rate": 2e-2},
        "checkpoint": {"steps": 1},
        "output_dir": "lora",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = {
        "lora": [],
        "dora": ["method=dora", "model.dtype=bfloat16"],
        "qlora": [f"model.path={folder / 'llama-4bit'}"],
        "quantised": [*QUANTISED, f"data.chat_template={folder / 'own.jinja'}"],
        "staged": ["method=full", "parallel.nproc=2", "parallel.pipeline.num_stages=2"],
    }
    train_all(folder / "config.yaml", {folder / name: overrides for name, overrides in arguments.items()})
    return folder


def export(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments)])


def logits(folder: Path, adapter: Path | None = None) -> mx.array:
    """In evaluation mode, as float32; and the model generates."""
    model, tokenizer = load_folder(str(folder), adapter_path=None if adapter is None else str(adapter))
    assert isinstance(generate(model, tokenizer, prompt="Say 3 twice.", max_tokens=3), str)
    return model(TOKENS).astype(mx.float32)


def closest(a: mx.array, b: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    return float(mx.abs(a - b).max() / mx.abs(b).max())


def test_an_adapter_run_becomes_one_model(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mine"
    assert export(runs / "lora", "--output", output, "--gguf", "f16") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"exporting the adapter in {runs / 'lora' / 'final'}",
        "The adapters are fused into the weights.",
        f"written: {output}, with a model card in README.md",
    ]
    unfused = logits(runs / "llama", runs / "lora" / "final")
    assert closest(logits(output), unfused) < 1e-5
    assert closest(logits(runs / "llama"), unfused) > 1e-2
    text = (output / "README.md").read_text()
    assert "\n- rows read: 50 (" in text
    assert "\nllama, fine-tuned with LoRA by mlx-distributed." in text
    assert not any(str(runs).encode() in path.read_bytes() for path in output.iterdir())
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(output / "model-f16.gguf").tensors}
    stored = mx.load(str(output / "model.safetensors"))
    assert len(tensors) == len(stored)
    for name, array in {"token_embd": "model.embed_tokens", "blk.1.attn_v": "model.layers.1.self_attn.v_proj"}.items():
        np.testing.assert_array_equal(
            tensors[f"{name}.weight"], np.asarray(stored[f"{array}.weight"].astype(mx.float16))
        )


@pytest.mark.parametrize(
    ("arguments", "tolerance", "quantised"),
    [(["--adapter"], 0.0, True), (["--dequantize"], 1e-5, False), ([], 0.25, True)],
)
def test_a_quantised_base(
    runs: Path, tmp_path: Path, arguments: list[str], tolerance: float, quantised: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Rounding the sum to 4 bits again loses what --dequantize and --adapter keep, and that is said."""
    output = tmp_path / "mine"
    assert export(runs / "qlora", "--output", output, *arguments) == 0
    unfused = logits(runs / "llama-4bit", runs / "qlora" / "final")
    if arguments == ["--adapter"]:
        assert json.loads((output / "adapter_config.json").read_text())["model"] == "llama-4bit"
        assert mx.array_equal(logits(runs / "llama-4bit", output), unfused)
        return
    assert 0 < closest(logits(output), unfused) < tolerance
    assert ("quantization" in json.loads((output / "config.json").read_text())) == quantised
    assert ("was rounded to 4 bits again in 14 layers" in capsys.readouterr().out) == quantised


def test_a_base_that_the_run_has_quantised(runs: Path, tmp_path: Path) -> None:
    """The export is of what was trained, in bits and in dtype, and is asked as it was taught."""
    assert export(runs / "quantised", "--output", tmp_path / "a") == 0
    assert export(runs / "quantised", "--output", tmp_path / "b", "--dequantize", "--checkpoint", "last") == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]["bits"] == 4
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == (runs / "own.jinja").read_text()
    assert 0 < closest(logits(tmp_path / "a"), logits(tmp_path / "b")) < 0.25
    assert {array.dtype for array in mx.load(str(tmp_path / "b" / "model.safetensors")).values()} == {mx.bfloat16}


def test_weights_have_the_dtype_that_was_asked_for(runs: Path, tmp_path: Path) -> None:
    unfused, _ = load_folder(str(runs / "llama"), adapter_path=str(runs / "dora" / "final"))
    for dtype, arguments in ((mx.bfloat16, []), (mx.float16, ["--dtype", "float16"])):
        output = tmp_path / str(dtype)
        assert export(runs / "dora", "--output", output, *arguments) == 0
        assert {array.dtype for array in mx.load(str(output / "model.safetensors")).values()} == {dtype}
        assert closest(logits(output), unfused(TOKENS)) < 3e-2


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("method", ["adapter", "full"])
def test_a_checkpoint_of_a_run(
    runs: Path, config: Path, undisturbed: Path, tmp_path: Path, which: str, method: str
) -> None:
    run = undisturbed if method == "full" else runs / "lora"
    base = config.parent / "tied" if method == "full" else runs / "llama"
    assert export(run, "--checkpoint", which, "--output", tmp_path / "a") == 0
    folder = run / "checkpoints"
    found = newest_valid(folder, print) if which == "last" else best(folder, print)
    assert found is not None
    assert export(found.folder, "--output", tmp_path / "b") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    if method == "full":
        model, _ = load_folder(str(base))
        model.load_weights(list(found.parameters().items()))
        assert mx.array_equal(logits(tmp_path / "a"), model(TOKENS))
    elif which == "last":
        assert closest(logits(tmp_path / "a"), logits(base, run / "final")) < 1e-5
    assert "exporting" not in (tmp_path / "a" / "README.md").read_text()


def test_a_checkpoint_in_stages_is_one_model(runs: Path, tmp_path: Path) -> None:
    for name, arguments in (("a", ["--checkpoint", "last"]), ("b", [])):
        assert export(runs / "staged", "--output", tmp_path / name, *arguments) == 0
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_a_finished_full_model_and_a_folder_of_no_run(undisturbed: Path, tmp_path: Path) -> None:
    assert export(undisturbed, "--output", tmp_path / "a") == 0
    final = logits(undisturbed / "final")
    assert mx.array_equal(logits(tmp_path / "a"), final)
    alone = shutil.copytree(undisturbed / "final", tmp_path / "alone")
    assert export(alone) == 0
    assert mx.array_equal(logits(tmp_path / "export"), final)
    assert "A model, exported by mlx-distributed." in (tmp_path / "export" / "README.md").read_text()


def test_an_adapter_of_no_run(runs: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(runs / "lora" / "final", tmp_path / "alone")
    assert export(alone) == 0
    assert closest(logits(tmp_path / "export"), logits(runs / "llama", alone)) < 1e-5


def test_data_that_are_gone_are_not_missed(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "lora", tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"][0]["path"] = "/nowhere/rows.jsonl"
    settings["data"]["val_fraction"] = 0.5
    settings["eval"]["generate"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert export(run) == 0
    assert (run / "export" / "model.safetensors").exists()


def test_a_model_from_scratch_needs_its_data_for_a_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    arch = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    arch |= {"num_attention_heads": 4, "vocab_size": 300}
    settings = yaml.safe_load(config.read_text()) | {"model": {"scratch": arch}}
    (tmp_path / "scratch.yaml").write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    train_all(tmp_path / "scratch.yaml", {run: ["train.max_steps=1"]})
    assert export(run, "--checkpoint", "last") == 0
    assert mx.array_equal(logits(run / "export"), logits(run / "final"))
    assert "A new model, trained, all of it, by mlx-distributed." in (run / "export" / "README.md").read_text()
    write_rows(tmp_path / "rows.jsonl", 49)
    assert export(run, "--checkpoint", "last", "--overwrite") == 2
    assert "data is" in capsys.readouterr().err


def test_mlx_lm_fuses_final_to_the_same_model(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And to the same numbers."""
    arguments = ["--model", runs / "llama", "--adapter-path", runs / "lora" / "final", "--save-path", tmp_path / "f"]
    monkeypatch.setattr("sys.argv", ["mlx_lm.fuse", *map(str, arguments)])
    mlx_lm_fuse()
    assert export(runs / "lora", "--output", tmp_path / "e") == 0
    theirs, ours = (mx.load(str(tmp_path / name / "model.safetensors")) for name in "fe")
    assert theirs.keys() == ours.keys()
    assert all(mx.array_equal(theirs[name], ours[name]) for name in ours)


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a run, to be harmed."""
    return shutil.copytree(runs / "lora", tmp_path / "run")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(folder: Path, words: str, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> int:
    """The exit status; one paragraph was said, and `folder` is as it was."""
    before = names(folder)
    capsys.readouterr()
    status = export(*arguments)
    said = capsys.readouterr().err
    assert words in said
    assert said.splitlines()[-1].startswith("error: ")
    assert names(folder) == before
    return status


def test_what_is_not_whole_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = run / "final" / "adapters.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert refused(run, "adapters.safetensors is not whole", capsys, run) == 1
    newest = sorted((run / "checkpoints").iterdir())[-1]
    (newest / "params.safetensors").write_bytes(b"x" * (newest / "params.safetensors").stat().st_size)
    assert refused(run, "is corrupted: params.safetensors does not have the SHA-256", capsys, newest) == 1
    assert export(run, "--checkpoint", "last") == 0
    assert "passed over" in capsys.readouterr().err
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "final")
    assert refused(run, "has no final/, as the run has not come to its end; give --checkpoint last", capsys, run) == 2
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert refused(run, "is whole and has eval/loss", capsys, run, "--checkpoint", "best") == 1
    (run / "config.yaml").write_text("[")
    assert refused(run, "config.yaml is damaged", capsys, run, "--checkpoint", "best") == 2


def test_a_checkpoint_without_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"lora": {"rank": 3}}))
    assert refused(run, "does not fit the model of", capsys, newest) == 2
    (run / "run.json").unlink()
    assert refused(run, "has lost its run", capsys, newest) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}/rows"], "rows is no folder; give the output_dir"),
        (["{run}/logs"], "holds no run, no checkpoint of one and no model"),
        (["{run}/final", "--checkpoint", "last"], "--checkpoint last: {run}/final holds no run"),
        (["{run}", "--output", "{run}"], "is there already, and is no export"),
        (["{run}", "--output", "{run}/final", "--overwrite"], "is there already, and is no export"),
        (
            ["{run}", "--adapter", "--gguf", "f16"],
            "--adapter leaves the model below the adapters as it is; leave --gguf",
        ),
        (["{run}", "--private"], "--private is about what is uploaded"),
        (["{run}", "--dequantize"], "--dequantize: the model is not quantised"),
        (["{run}/../whole", "--adapter"], "has no adapters, all of it was trained"),
        (["{run}/../whole", "--gguf", "f16"], "the model is a qwen3"),
    ],
)
def test_what_cannot_be_done_is_refused(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(run / ".." / "whole")
    arguments = [argument.format(run=run) for argument in arguments]
    assert refused(run, words.format(run=run), capsys, *arguments) == 2


def test_only_an_export_is_replaced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(run) == 0
    assert refused(run, "is an earlier export; give another name, or --overwrite", capsys, run) == 2
    assert refused(run, "is what is to be exported", capsys, run / "export", "--overwrite") == 2
    (run / "export" / "model.safetensors").unlink()
    assert export(run, "--overwrite") == 0
    assert (run / "export" / "model.safetensors").exists()
    (run / "export" / "thesis").mkdir()
    assert refused(run, "is no export", capsys, run, "--overwrite") == 2


def test_a_full_disk_is_seen_before_anything_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(run)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert refused(run, "the export needs 0.1 GB, and", capsys, run) == 2


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3}'])
def test_an_adapter_that_does_not_say_of_what(
    runs: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(runs / "lora" / "final", tmp_path / "alone")
    (alone / "adapter_config.json").write_text(text)
    assert refused(tmp_path, "does not say which `model` the adapter is for", capsys, alone) == 2
