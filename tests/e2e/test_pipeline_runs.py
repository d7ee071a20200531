"""A model that is spread over workers: what it saves goes on with other ones, and a lost worker is named."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from support import Run, checkpoints, digest, metrics, train, train_all

from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.models import load, trainable

STAGES = ["--nproc", "2", "parallel.pipeline.num_stages=2"]
COPIES = ["--nproc", "4", "parallel.pipeline.num_stages=2"]


@pytest.fixture(scope="module")
def same(config: Path) -> list[str]:
    """Of a model whose embedding is on one worker alone, where the bits are those of one piece."""
    return [f"model.path={config.parent / 'untied'}"]


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
