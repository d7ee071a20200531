"""Runs whose workers agree less often than in every step: whatever ends one, it goes on as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from support import NUM_STEPS, Run, checkpoints, digest, metrics, steps, train, train_all

LATE = ["parallel.diloco.sync_every=6", "parallel.diloco.fragments=2", "parallel.diloco.overlap_steps=2"]
"""A sum is under way after steps 3, 4, 6, 7, 9 and so on."""
MODES = {
    "delayed, corrected, int8": ["parallel.sync=delayed", "parallel.delay_compensation=0.5", "parallel.wire=int8"],
    "diloco": ["parallel.sync=diloco", "parallel.diloco.sync_every=4"],
    "diloco, int4, uneven": ["parallel.sync=diloco", *LATE, "parallel.wire=int4", "parallel.share=[2, 1]"],
}


@pytest.mark.parametrize("mode", MODES)
def test_however_it_ends_it_goes_on(config: Path, tmp_path: Path, mode: str) -> None:
    arguments = ["--nproc", "2", "checkpoint.steps=4", *MODES[mode]]
    # To save, and to wait for what is under way, changes nothing: this run does not.
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    train_all(config, {whole: [*arguments, "checkpoint.steps=null"]})
    assert steps(whole) == list(range(1, NUM_STEPS + 1))
    moment = random.Random(mode)
    with Run(config, *arguments, "--output-dir", killed) as run:
        run.read_until(f"step {moment.randint(6, 12)}/")
        run.kill()
        run.wait()
    with Run(config, *arguments, "--output-dir", stopped) as run:
        run.read_until(f"step {moment.randint(3, 12)}/")
        run.interrupt()
        done = run.wait()
    last = steps(stopped)[-1]
    assert (done.status, done.stderr) == (130, "")
    assert f"interrupted: step {last} is saved, --resume goes on from there\n" in done.stdout
    assert checkpoints(stopped)[-1].name == f"step-{last:08d}"
    other = shutil.copytree(killed, tmp_path / "other")
    # As many copies as there were workers have to become more, or fewer.
    share = [] if "uneven" not in mode else ["parallel.share=even"]
    resumed = {folder: [*arguments, "--resume"] for folder in (killed, stopped)}
    train_all(config, resumed | {other: [*arguments, *share, "--resume", "--nproc", "3"]})
    for folder in (killed, stopped):
        assert digest(folder) == digest(whole), folder
        assert metrics(folder) == metrics(whole), folder
    assert steps(other) == list(range(1, NUM_STEPS + 1))


def test_delayed_is_the_same_on_any_number_of_workers(config: Path, tmp_path: Path) -> None:
    mode = ["parallel.sync=delayed", "parallel.delay_compensation=0.5"]
    folders = {tmp_path / nproc: ["--nproc", nproc, *mode] for nproc in ("1", "2", "3")}
    train_all(config, folders)
    first, *others = folders
    for other in others:
        assert digest(other) == digest(first)
        assert metrics(other) == metrics(first)


def test_a_run_does_not_change_how_workers_agree(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_all(config, {out: ["--nproc", "2", "train.max_steps=5"]})
    done = train(config, "--nproc", "2", "--resume", "--output-dir", out, "parallel.sync=diloco")
    assert done.status == 2
    assert "parallel.sync is missing there and diloco with 4 fragments every 32, 0 late here" in done.error
