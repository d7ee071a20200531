"""However a run ends, it goes on with `--resume` to the very state of a run that nothing happened to."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import NUM_STEPS, Run, checkpoints, digest, ends_within, metrics, steps, train, train_all

SAVE_ALWAYS = ["checkpoint.steps=1"]
MOMENTS: dict[str, tuple[list[str], str | None, str]] = {
    "a step": ([], None, "1"),
    "another step": ([], None, "3"),
    "checkpoint begun": (SAVE_ALWAYS, ".step-*.tmp", "3"),
    "checkpoint almost whole": (SAVE_ALWAYS, ".step-*.tmp/manifest.json", "1"),
}
"""How the run is configured, what is in the folder of its checkpoints when it is killed, and who goes on besides."""


def resume(config: Path, killed: Path, undisturbed: Path, *nprocs: str) -> None:
    """Go on from copies of what is left."""
    copies = {killed.with_name(f"resumed by {nproc}"): ["--resume", "--nproc", nproc] for nproc in nprocs}
    for copy in copies:
        shutil.copytree(killed, copy)
    train_all(config, copies)
    for copy in copies:
        assert digest(copy) == digest(undisturbed), copy
        assert metrics(copy) == metrics(undisturbed), copy
        assert all(path.name.startswith("step-") for path in (copy / "checkpoints").iterdir()), copy


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_of_everything(config: Path, undisturbed: Path, tmp_path: Path, moment: str) -> None:
    arguments, sign, other = MOMENTS[moment]
    killed = tmp_path / "killed"
    with Run(config, *arguments, "--nproc", "2", "--output-dir", killed) as run:
        run.read_until(f"step {random.Random(moment).randint(1, NUM_STEPS // 2)}/")
        if sign is not None:
            run.spin_until(lambda: [*(killed / "checkpoints").glob(sign)])
        run.kill()
        assert run.wait().status == -signal.SIGKILL
    assert not (killed / "final").exists()
    resume(config, killed, undisturbed, "2", other)


def test_workers_end_when_the_command_is_killed(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    with Run(config, "--nproc", "3", "--output-dir", killed) as run:
        run.read_until("step 8/")
        workers = run.workers
        assert len(workers) == 3
        run.kill_parent()
        assert all(ends_within(pid, 5.0) for pid in workers)
    assert not (killed / "final").exists()
    resume(config, killed, undisturbed, "1")


def test_ctrl_c_saves(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with Run(config, "--nproc", "2", "--output-dir", stopped) as run:
        run.read_until("step 6/")
        run.interrupt()
        done = run.wait()
    last = steps(stopped)[-1]
    assert (done.status, done.stderr) == (130, "")
    assert f"interrupted: step {last} is saved, --resume goes on from there\n" in done.stdout
    assert checkpoints(stopped)[-1].name == f"step-{last:08d}"
    assert not (stopped / "final").exists()
    done = train(config, "--resume", "--nproc", "3", "--output-dir", stopped)
    assert done.status == 0, done
    assert digest(stopped) == digest(undisturbed)
    assert metrics(stopped) == metrics(undisturbed)


def test_ctrl_c_twice(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with Run(config, "--nproc", "2", "--output-dir", stopped) as run:
        run.read_until("step 9/")
        run.interrupt()
        run.interrupt()
        assert run.wait().status == 130
    resume(config, stopped, undisturbed, "1")


def test_ctrl_c_while_workers_start(config: Path, tmp_path: Path) -> None:
    with Run(config, "--nproc", "2", "--output-dir", tmp_path / "out") as run:
        run.spin_until(lambda: len(run.workers) == 2)
        run.interrupt()
        done = run.wait()
    assert (done.status, done.stdout, done.stderr) == (130, "", "")
    assert checkpoints(tmp_path / "out") == []


def test_two_runs_do_not_share_a_folder(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(config, "--output-dir", folder) as run:
        run.read_until("step 1/")
        (worker,) = run.workers
        os.kill(worker, signal.SIGSTOP)
        second = train(config, "--resume", "--output-dir", folder)
        os.kill(worker, signal.SIGCONT)
        first = run.wait()
    assert second.status == 2
    assert "a run is writing into it right now" in second.error
    assert (first.status, first.stderr) == (0, "")
    assert digest(folder) == digest(undisturbed)
    assert metrics(folder) == metrics(undisturbed)


def truncate(folder: Path) -> None:
    os.truncate(folder / "params.safetensors", 1000)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "optimizer.safetensors").read_bytes())
    data[-7] ^= 16
    (folder / "optimizer.safetensors").write_bytes(data)


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_manifest])
def test_a_damaged_checkpoint_is_passed_over(
    config: Path, undisturbed: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "damaged"))
    *_, older, newest = checkpoints(folder)
    damage(newest)
    done = train(config, "--resume", "--output-dir", folder)
    assert done.status == 0, done
    assert f"passed over: {newest}" in done.stdout
    assert f"resumed from {older}, step {older.name.removeprefix('step-').lstrip('0')}\n" in done.stdout
    assert digest(folder) == digest(undisturbed)
    assert metrics(folder) == metrics(undisturbed)


def test_resume_of_a_finished_run_changes_nothing(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "finished"))
    shutil.rmtree(folder / "final")
    done = train(config, "--resume", "--output-dir", folder)
    assert done.status == 0, done
    assert digest(folder) == digest(undisturbed)
    assert metrics(folder) == metrics(undisturbed)
    assert {path.name for path in (folder / "final").iterdir()} == {
        path.name for path in (undisturbed / "final").iterdir()
    }


def test_resume_of_nothing_begins_anew(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = train(config, "--resume", "--output-dir", folder)
    assert done.status == 0, done
    assert "nothing to resume from: starting at the beginning\n" in done.stdout
    assert digest(folder) == digest(undisturbed)
