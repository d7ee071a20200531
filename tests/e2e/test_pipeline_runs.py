"""A model that is spread over workers: what it saves goes on with other ones, and a lost worker is named."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support import Command, Run, checkpoints, digest, metrics, train, train_all

from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.models import load, trainable
from mlx_distributed.testing import tiny_model
from mlx_distributed.train.checkpoint import open_checkpoint

STAGES = ["--nproc", "2", "parallel.pipeline.num_stages=2"]
COPIES = ["--nproc", "4", "parallel.pipeline.num_stages=2"]


@pytest.fixture(scope="module")
def same(config: Path) -> list[str]:
    """Of a model whose embedding is on one worker alone, where the bits are those of one piece."""
    return [f"model.path={config.parent / 'untied'}", "eval.generate=true", "eval.max_new_tokens=8"]


@pytest.fixture(scope="module")
def whole(config: Path, same: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on one worker."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train_all(config, {folder: same})
    return folder


def test_kill_of_everything_and_resume_with_other_stages(
    config: Path, same: list[str], whole: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    with Run(config, *STAGES, *same, "--output-dir", killed) as run:
        run.read_until("step 8/")
        run.kill()
        assert run.wait().status == -signal.SIGKILL
    assert {"rank-0000.safetensors", "rank-0001.safetensors"} <= {
        path.name for path in checkpoints(killed)[-1].iterdir()
    }
    copies = {tmp_path / "1": [], tmp_path / "2 stages": STAGES, tmp_path / "2 copies of 2 stages": COPIES}
    for copy in copies:
        shutil.copytree(killed, copy)
    train_all(config, {copy: ["--resume", *same, *arguments] for copy, arguments in copies.items()})
    for copy in copies:
        assert digest(copy) == digest(whole), copy
        assert metrics(copy) == metrics(whole), copy
        assert (copy / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text(), copy
        for file in ("model.safetensors", "model.safetensors.index.json"):
            assert (copy / "final" / file).read_bytes() == (whole / "final" / file).read_bytes(), copy
        models = [trainable(load(ModelConfig(path=str(folder / "final")))[0]) for folder in (copy, whole)]
        assert models[0].keys() == models[1].keys()
        assert all((models[0][name] == models[1][name]).all().item() for name in models[0])


def test_a_lost_stage_is_named_and_the_last_checkpoint_is_whole(
    config: Path, same: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with Run(config, *COPIES, *same, "--output-dir", folder) as run:
        run.read_until("step 7/")
        os.kill(run.workers[3], signal.SIGKILL)
        done = run.wait()
    assert done.status == 1, done
    assert "Traceback" not in done.stdout + done.stderr
    assert "rank 3: stage 1 of the pipeline: " in done.stderr, done
    last = checkpoints(folder)[-1].name
    (line,) = (line for line in done.stdout.splitlines() if "cannot be saved" in line)
    assert line.endswith(
        f"a part of the layers (parallel.pipeline): --resume goes on from the last whole checkpoint ({last})"
    )
    done = train(config, "--resume", *same, "--output-dir", folder)
    assert done.status == 0, done
    assert digest(folder) == digest(whole)
    assert metrics(folder) == metrics(whole)


@contextmanager
def machines(
    config: Path, folder: Path, *arguments: str, joins: Sequence[str | Path] = ()
) -> Iterator[tuple[Command, Command]]:
    """Two commands that share a run, as two machines would: the first one's output is in `folder` itself."""
    own = ["parallel.listen=127.0.0.1:0", "--output-dir", folder]
    with Command("mlx-train", "--config", config, *arguments, *own) as first:
        text, second = first.join_string(), folder.with_name(f"{folder.name}-2")
        with Command("mlx-train", "--join", text, "--output-dir", second, *joins) as other:
            yield first, other


def test_several_machines_give_the_bits_of_one(config: Path, same: list[str], whole: Path, tmp_path: Path) -> None:
    stages = ["parallel.pipeline.num_stages=2", "parallel.pipeline.schedule=auto", *same]
    two, four = tmp_path / "two", tmp_path / "four"
    copies = ["--nproc", "2", "parallel.num_workers=4"]
    with (
        machines(config, two, "parallel.num_workers=2", *stages) as one_each,
        machines(config, four, *copies, *stages, joins=["--nproc", "2"]) as two_each,
    ):
        for command in (*one_each, *two_each):
            done = command.wait()
            assert (done.status, done.stderr) == (0, ""), done
            assert re.search(r"\npipeline: layers 0 \| 1, .*; (1f1b|zb-h1|gpipe), the fastest at ", done.stdout), done
    for folder in (two, four):
        assert digest(folder) == digest(whole), folder
        assert metrics(folder) == metrics(whole), folder
        assert not (folder.with_name(f"{folder.name}-2") / "config.yaml").exists()


def test_a_lost_machine_is_named_and_others_go_on(config: Path, same: list[str], whole: Path, tmp_path: Path) -> None:
    killed, stages = tmp_path / "killed", ["parallel.num_workers=2", "parallel.pipeline.num_stages=2", *same]
    with machines(config, killed, *stages) as (first, other):
        first.read_until("step 8/")
        other.kill()
        done = first.wait()
    assert done.status == 1
    assert re.search(r"rank 1: stage 1 of the pipeline on \S+ \(127\.0\.0\.1\): ", done.error), done
    assert "--resume goes on from the last whole checkpoint (step-00000005)" in done.stdout
    alone, again = tmp_path / "alone", tmp_path / "again"
    for copy in (alone, again):
        shutil.copytree(killed, copy)
    with machines(config, again, "--resume", *stages) as pair:
        train_all(config, {alone: ["--resume", *same]})
        assert [command.wait().status for command in pair] == [0, 0]
    for copy in (alone, again):
        assert digest(copy) == digest(whole), copy
        assert metrics(copy) == metrics(whole), copy


def test_ctrl_c_on_one_machine_saves_and_ends_all(config: Path, same: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with machines(config, out, "parallel.num_workers=2", "optimizer.shard=true", *same) as (first, other):
        first.read_until("step 4/")
        other.interrupt()
        endings = [command.wait() for command in (other, first)]
    assert [(done.status, done.stderr) for done in endings] == [(130, "")] * 2, endings
    last = int(checkpoints(out)[-1].name.removeprefix("step-"))
    assert f"interrupted: step {last} is saved, --resume goes on from there\n" in endings[1].stdout


def test_a_machine_that_refuses_the_run_is_named(config: Path, same: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with machines(config, out, "parallel.num_workers=2", *same, joins=["--output-dir", whole]) as (first, other):
        endings = [command.wait() for command in (other, first)]
    assert [done.status for done in endings] == [2, 2], endings
    assert re.match(r"output_dir=.* holds the run \w+, and the one to be joined is ", endings[0].error)
    assert re.match(r"rank 1, \S+ \(127\.0\.0\.1\): output_dir=.* holds the run ", endings[1].error), endings[1]
    assert not (out / "config.yaml").exists()


def test_any_stage_that_is_lost_or_stalls_is_named(config: Path, tmp_path: Path) -> None:
    deep = tiny_model(tmp_path / "deep", num_layers=3, tied=False)
    lost = [
        (2, signal.SIGSTOP, ["parallel.timeout_s=2"]),
        (0, signal.SIGKILL, ["parallel.pipeline.schedule=zb-h1"]),
        (1, signal.SIGKILL, ["parallel.pipeline.activations=keep"]),
    ]
    with ExitStack() as stack:
        runs = []
        for stage, _, settings in lost:
            arguments = ["--nproc", "3", "parallel.pipeline.num_stages=3", f"model.path={deep}", "train.max_steps=9999"]
            folder = tmp_path / f"lost-{stage}"
            runs.append(stack.enter_context(Run(config, *arguments, *settings, "--output-dir", folder)))
        for run, (stage, kind, _) in zip(runs, lost, strict=True):
            run.read_until("step 6/")
            os.kill(run.workers[stage], kind)
        for run, (stage, _, _) in zip(runs, lost, strict=True):
            done = run.wait()
            assert done.status == 1, done
            assert f"rank {stage}: stage {stage} of the pipeline" in done.stderr, done
            assert open_checkpoint(checkpoints(tmp_path / f"lost-{stage}")[-1]).meta.step >= 5
