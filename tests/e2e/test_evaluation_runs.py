"""Runs that generate, stop early and keep the best; and evaluations of what they have saved."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support import Done, Run, digest, metrics, steps, train, train_all

from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.cli.train import main
from mlx_distributed.config import load_config
from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.models import load, trainable
from mlx_distributed.train.checkpoint import open_checkpoint

# Of a model that learns so little, no answer is ever exact: the first evaluation is the best, the third the last.
EARLY = [
    *("eval.steps=2", "eval.patience=2", "eval.generate=true", "eval.metrics=[exact_match, chrf, bleu, rougeL]"),
    *("eval.max_new_tokens=6", "checkpoint.metric_for_best=eval/exact_match", "checkpoint.final=best"),
    *("checkpoint.save_total_limit=1", "checkpoint.steps=3"),
]
LAST_STEP = 6


@pytest.fixture(scope="module")
def early(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """How a run on two workers ended, and its output."""
    folder = tmp_path_factory.mktemp("early") / "out"
    done = train(config, *EARLY, "--nproc", "2", "--output-dir", folder)
    assert (done.status, done.stderr) == (0, ""), done
    return done, folder


def answers(folder: Path) -> list[str]:
    return (folder / "samples.jsonl").read_text().splitlines()


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_that_gets_no_better_ends_early_with_its_best(early: tuple[Done, Path]) -> None:
    done, folder = early
    assert steps(folder) == [*range(1, LAST_STEP + 1)]
    said = "stopped early after step 6: in 2 evaluations eval/exact_match has not become better by more than 0"
    assert said in done.stdout
    assert "eval/bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in done.stdout
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000006"]
    assert "final/ holds the best checkpoint, of step 2" in done.stdout
    best = open_checkpoint(folder / "checkpoints" / "step-00000002").parameters()
    final = trainable(load(ModelConfig(path=str(folder / "final")))[0])
    assert final.keys() == best.keys()
    assert all((final[name] == best[name]).all().item() for name in best)
    lines = [json.loads(line) for line in answers(folder)]
    evaluated = [line for line in metrics(folder) if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == sorted({line["step"] for line in lines}) == [2, 4, 6]
    for evaluation in evaluated:
        each = [line["eval/rougeL"] for line in lines if line["step"] == evaluation["step"]]
        assert evaluation["eval/rougeL"] == pytest.approx(sum(each) / len(each))


def test_it_ends_there_after_a_kill_and_without_fixed_workers_too(
    config: Path, early: tuple[Done, Path], tmp_path: Path
) -> None:
    _, whole = early
    killed, elastic = tmp_path / "killed", tmp_path / "elastic"
    with Run(config, *EARLY, "--output-dir", killed) as run:
        run.read_until("step 5/")
        run.kill()
        run.wait()
    train_all(
        config,
        {killed: [*EARLY, "--resume", "--nproc", "3"], elastic: [*EARLY, "--nproc", "2", "elastic.enabled=true"]},
    )
    for folder in (killed, elastic):
        assert metrics(folder) == metrics(whole)
        assert answers(folder) == answers(whole)
        assert digest(folder) == digest(whole)
        assert files(folder / "final") == files(whole / "final")


def test_the_best_is_the_finished_model_wherever_its_parts_were(config: Path, tmp_path: Path) -> None:
    """On stages of a pipeline and with a sharded optimizer, the bits of one worker; with DiLoCo, what was agreed on."""
    one, stages, shard, diloco = (tmp_path / name for name in ("one", "stages", "shard", "diloco"))
    ways = {
        one: [],
        stages: ["--nproc", "2", "parallel.pipeline.num_stages=2"],
        shard: ["--nproc", "2", "optimizer.shard=true"],
        diloco: ["--nproc", "2", "parallel.sync=diloco", "parallel.diloco.sync_every=1", "parallel.diloco.fragments=1"],
    }
    shared = [*EARLY, "eval.patience=1", "eval.metrics=[exact_match]", f"model.path={config.parent / 'untied'}"]
    train_all(config, {folder: [*shared, *arguments] for folder, arguments in ways.items()})
    for folder in ways:
        assert steps(folder)[-1] == 4
        first, last = (open_checkpoint(folder / "checkpoints" / f"step-0000000{step}").parameters() for step in (2, 4))
        final = trainable(load(ModelConfig(path=str(folder / "final")))[0])
        assert final.keys() == first.keys()
        assert all((final[name] == first[name]).all().item() for name in first), folder
        assert not all((final[name] == last[name]).all().item() for name in last), folder
    for folder in (stages, shard):
        assert digest(folder) == digest(one)
        assert metrics(folder) == metrics(one)
        assert answers(folder) == answers(one)
        assert files(folder / "final") == files(one / "final")


def test_an_evaluation_is_the_same_on_any_number_of_workers_and_touches_nothing(
    config: Path, early: tuple[Done, Path], tmp_path: Path
) -> None:
    _, whole = early
    workers = {"1": "1", "2": "2", "3": "1"}
    copies = {shutil.copytree(whole, tmp_path / nproc): nproc for nproc in workers}
    asked = [*EARLY, "--eval-only", "--resume", "last"]
    train_all(
        config,
        {
            copy: [*asked, "--nproc", nproc, f"parallel.pipeline.num_stages={workers[nproc]}"]
            for copy, nproc in copies.items()
        },
    )
    [last] = [line for line in metrics(whole) if line["step"] == LAST_STEP and "eval/loss" in line]
    lines = [line for line in map(json.loads, answers(whole)) if line["step"] == LAST_STEP]
    for copy in copies:
        found = json.loads((copy / "eval.json").read_text())
        assert found.items() >= last.items()
        assert found["checkpoint"] == str(copy / "checkpoints" / "step-00000006")
        assert [{"step": LAST_STEP, **sample} for sample in found["samples"]] == lines
        (copy / "eval.json").unlink()
        assert files(copy) == files(whole)


def test_what_is_not_trained_yet_is_evaluated(config: Path, tmp_path: Path) -> None:
    done = train(config, "--eval-only", "--output-dir", tmp_path / "out")
    assert (done.status, done.stderr) == (0, ""), done
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["eval.json"]
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (found["step"], found["checkpoint"], found["samples"]) == (0, None, [])
    assert found["eval/loss"] > 4
    with open_output_dir(load_config(config, [f"output_dir={tmp_path / 'out'}"]), resume=False).lock:
        assert (tmp_path / "out" / "run.json").exists()  # It holds no run yet, and may become the folder of one.


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--resume", "best"], 1, "there is no whole evaluated checkpoint"),
        (["data.val_fraction=0"], 2, "--eval-only needs rows to evaluate on; set data.validation"),
    ],
)
def test_what_cannot_be_evaluated(
    config: Path, tmp_path: Path, arguments: list[str], status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["--config", str(config), "--eval-only", "--output-dir", str(folder), *arguments]) == status
    assert words in capfd.readouterr().err
    assert not folder.exists()
