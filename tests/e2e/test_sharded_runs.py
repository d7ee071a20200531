"""A run with a sharded optimizer ends as it may; others go on from what it has saved, sharded or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

from support import Run, checkpoints, digest, metrics, train, train_all

SHARD = "optimizer.shard=true"


def test_kill_of_everything(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    with Run(config, "--nproc", "3", SHARD, "--output-dir", killed) as run:
        run.read_until("step 8/")
        run.kill()
        assert run.wait().status == -signal.SIGKILL
    files = {path.name for path in checkpoints(killed)[-1].iterdir()}
    assert {f"rank-000{rank}.safetensors" for rank in range(3)} <= files
    copies = {
        tmp_path / "2 sharded": ["--resume", "--nproc", "2", SHARD],
        tmp_path / "3 sharded": ["--resume", "--nproc", "3", SHARD],
        tmp_path / "1": ["--resume"],
        tmp_path / "2": ["--resume", "--nproc", "2"],
    }
    for copy in copies:
        shutil.copytree(killed, copy)
    train_all(config, copies)
    for copy in copies:
        assert digest(copy) == digest(undisturbed), copy
        assert metrics(copy) == metrics(undisturbed), copy


def test_a_replicated_run_goes_on_sharded(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    with Run(config, "--nproc", "2", "--output-dir", killed) as run:
        run.read_until("step 8/")
        run.kill()
    done = train(config, "--resume", "--nproc", "3", SHARD, "--output-dir", killed)
    assert done.status == 0, done
    assert digest(killed) == digest(undisturbed)
    assert metrics(killed) == metrics(undisturbed)


def test_after_a_loss_the_last_whole_checkpoint_is_named(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(config, "--nproc", "3", SHARD, "--output-dir", folder) as run:
        run.read_until("step 7/")
        os.kill(run.workers[2], signal.SIGKILL)
        done = run.wait()
    assert done.status == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "rank 2" in done.stderr
    last = checkpoints(folder)[-1].name
    lines = [line for line in done.stdout.splitlines() if "cannot be saved" in line]
    assert len(lines) == 1, done
    assert lines[0].endswith(f"--resume goes on from the last whole checkpoint ({last})")
    done = train(config, "--resume", "--nproc", "2", SHARD, "--output-dir", folder)
    assert done.status == 0, done
    assert digest(folder) == digest(undisturbed)
    assert metrics(folder) == metrics(undisturbed)


def test_a_segment_that_is_missing_is_refused(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    train_all(config, {folder: ["--nproc", "2", SHARD, "train.max_steps=1"]})
    (checkpoint,) = checkpoints(folder)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["rank-0001.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (["--nproc", "2", SHARD], ["--nproc", "1"]):
        done = train(config, "--resume", *arguments, "train.max_steps=2", "--output-dir", folder)
        assert done.status == 1
        assert f"{checkpoint} is corrupted: " in done.error
