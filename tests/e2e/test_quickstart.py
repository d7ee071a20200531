"""The quick start, shortened: what it says, what it leaves, and that mlx-lm takes it. And what the commands say."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import mlx_lm
import pytest
from support import MLX_TRAIN, Done, metrics, steps, train

from mlx_distributed.config import load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SHORT = ["train.max_steps=40", "checkpoint.steps=20", "eval.max_examples=8"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """How it ended, and its output."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    done = train(QUICKSTART, *SHORT, "train.device=cpu", "--output-dir", folder)
    assert (done.status, done.stderr) == (0, ""), done
    return done, folder


def test_what_it_says(quickstart: tuple[Done, Path]) -> None:
    done, folder = quickstart
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step ") and "  loss " in line for line in lines) == 40
    comparison = lines.index(next(line for line in lines if line.startswith("held-out loss: ")))
    loss, exact_match, *samples = lines[comparison : comparison + 5]
    before, after = (float(figure) for figure in loss.removeprefix("held-out loss: ").split(" -> "))
    assert before > 4 > after
    assert exact_match.startswith("held-out exact match: ")
    assert all("Write " in line and " -> " in line for line in samples)
    assert lines[comparison + 5 :] == [f"the model is in {folder / 'final'}; try it:", lines[-1]]
    assert lines[-1].startswith(f"  uv run mlx_lm.generate --model {folder / 'final'} --prompt 'Write ")


def test_what_it_leaves(quickstart: tuple[Done, Path]) -> None:
    _, folder = quickstart
    names = {"config.yaml", "run.json", "data.json", "metrics.jsonl", "samples.jsonl", "logs", "checkpoints", "final"}
    assert {path.name for path in folder.glob("[!.]*")} == names
    assert {path.name for path in (folder / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert "step 40/40" in (folder / "logs" / "rank-1.log").read_text()
    for step in (20, 40):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        files = {"manifest.json", "params.safetensors", "optimizer.safetensors"}
        assert {path.name for path in checkpoint.iterdir()} == files
    assert set(json.loads((folder / "run.json").read_text())) == {"run_id", "wandb_id", "versions"}
    assert steps(folder) == [*range(1, 41)]
    evaluations = [line for line in metrics(folder) if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 40]


def test_mlx_lm_takes_the_model(quickstart: tuple[Done, Path]) -> None:
    _, folder = quickstart
    model, tokenizer = mlx_lm.load(str(folder / "final"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write 7 in words."}], add_generation_prompt=True
    )
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=8)


def test_the_resolved_configuration_loads_back(quickstart: tuple[Done, Path], tmp_path: Path) -> None:
    _, folder = quickstart
    arguments = [*SHORT, "train.device=cpu"]
    printed = train(QUICKSTART, *arguments, "--output-dir", folder, "--print-config")
    assert (printed.status, printed.stderr) == (0, "")
    assert printed.stdout == (folder / "config.yaml").read_text()
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    config = load_config(QUICKSTART, arguments)
    assert load_config(tmp_path / "printed.yaml") == replace(config, output_dir=folder)


def test_a_dry_run_writes_nothing(config: Path, tmp_path: Path) -> None:
    done = train(config, "--nproc", "3", "parallel.share=[1, 2, 3]", "--dry-run", "--output-dir", tmp_path / "out")
    assert (done.status, done.stderr) == (0, "")
    assert "20 steps of 12 rows, 4 steps per epoch\n" in done.stdout
    assert "worker 2: 3 of the 6 micro-batches of a step\n" in done.stdout
    assert [*tmp_path.iterdir()] == []


def test_the_current_folder_is_not_imported_from(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    done = train(config, "train.max_steps=1", "--output-dir", "out")
    assert (done.status, done.stderr) == (0, ""), done


@pytest.mark.parametrize("command", ["mlx-train", "mlx-distributed"])
def test_help_has_an_example(command: str) -> None:
    done = subprocess.run([MLX_TRAIN.with_name(command), "--help"], capture_output=True, text=True, check=True)
    assert f"\n  {command} " in done.stdout.partition("example")[2]
