"""Weights & Biases offline: what real runs have recorded, whatever the number of workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Run, epochs, metrics, train_all
from wandb_log import WandbRun, keep_from_home, read_runs

WANDB = ["wandb.project=p", "wandb.mode=offline", "wandb.log_checkpoints=true", "wandb.log_final=true"]
SHORT = ["checkpoint.steps=2", *WANDB]
ALL_WORKERS = ["wandb.system_metrics=true", "wandb.tags=[a]"]


@pytest.fixture(autouse=True, scope="module")
def wandb_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_from_home(tmp_path_factory.mktemp("home"), monkeypatch)
        monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.1")  # 15 s by default
        yield


@pytest.fixture(scope="module")
def three(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on three workers."""
    folder = tmp_path_factory.mktemp("three") / "out"
    train_all(config, {folder: [*SHORT, *ALL_WORKERS, "train.max_steps=4", "--nproc", "3"]})
    return folder


def recorded(folder: Path) -> tuple[list[WandbRun], list[WandbRun]]:
    """The run itself, once for each time that it was opened, and those of the other workers."""
    found = [read for read in read_runs(folder / "wandb") if read.run is not None]  # of a worker killed at once
    main = [read for read in found if read.run.job_type != "worker"]
    return main, [read for read in found if read.run.job_type == "worker"]


def told(*runs: WandbRun) -> list[dict[str, Any]]:
    """What was logged, without measured times."""
    rows = [row for run in runs for row in run.history]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def test_one_run_for_any_number_of_workers(config: Path, three: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    elsewhere = ["--resume", str(three / "checkpoints" / "step-00000002")]
    train_all(
        config,
        {
            three: [*SHORT, "train.max_steps=6", "--resume"],
            two: [*SHORT, *ALL_WORKERS, "train.max_steps=4", "--nproc", "2", *elsewhere],
        },
    )
    (first, second), workers = recorded(three)
    run_id = first.run.run_id
    assert (second.run.run_id, first.run.run_group, second.run.run_group) == (run_id, run_id, "")
    assert [row["step"] for row in told(first, second)] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert told(first, second) == metrics(three)
    assert first.config["output_dir"] == str(three)
    assert first.aliases == {
        "data": [["latest"]],
        f"{run_id}-config": [["latest"]],
        f"{run_id}-checkpoint": [["latest", "step-2"], ["latest", "step-4"], ["best", "latest", "step-4"]],
        f"{run_id}-final": [["final", "latest", "step-4"]],
    }
    assert sorted(read.run.run_id.split("-")[:3] for read in workers) == [[run_id, "rank", "1"], [run_id, "rank", "2"]]
    assert all((read.history, read.artifacts, read.run.run_group) == ([], [], run_id) for read in workers)
    assert all(read.num_records["stats"] and list(read.run.tags) == ["a"] for read in [first, *workers])

    # Which run it is, says the checkpoint here, which rank 0 alone has read.
    [copy], [worker] = recorded(two)
    assert (copy.run.run_id, worker.run.run_group) == (run_id, run_id)
    assert told(copy) == metrics(two)


def test_another_worker_goes_on_with_the_run(config: Path, three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    elsewhere = ["--resume", str(three / "checkpoints" / "step-00000002")]
    arguments = ["elastic.enabled=true", "checkpoint.steps=100", "train.max_steps=30", *WANDB, *elsewhere]
    with Run(config, *arguments, "--nproc", "2", "--output-dir", folder) as run:
        run.read_until("2 workers train")
        for _ in range(3):  # Who has read the checkpoint begins alone.
            run.read_until("  loss ")
        leader = epochs(folder)[-1][0]
        os.kill(run.workers[int(leader.rpartition("-")[2])], signal.SIGKILL)
        done = run.wait()
    assert done.status == 0, done
    last = recorded(folder)[0][-1]
    assert last.run.run_id == recorded(three)[0][0].run.run_id
    assert told(last) == metrics(folder)[-len(last.history) :]
    assert last.aliases["data"] == [["latest"]]
    assert last.aliases[f"{last.run.run_id}-final"] == [["final", "latest", "step-30"]]
