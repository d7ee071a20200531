"""A run on a stream of rows: the same bits on any number of workers and after any end, and an end in words."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from support import Run, checkpoints, digest, metrics, steps, train_all, write_rows

NUM_ROWS = 130  # fewer than a run takes, so that the source begins again
STREAM = ["data.val_fraction=0.0", "data.streaming=true", "data.shuffle_buffer=60", "train.max_steps=16"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.train={write_rows(tmp_path_factory.mktemp('stream') / 'rows.jsonl', NUM_ROWS)}"


def test_any_number_of_workers_and_any_end_give_the_same_model(config: Path, rows: str, tmp_path: Path) -> None:
    same = [*STREAM, rows]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    variants = {
        tmp_path / "two": [*same, "--nproc", "2"],
        tmp_path / "elastic": [*same, "--nproc", "2", "elastic.enabled=true"],
    }
    with Run(config, *same, "--output-dir", killed) as run:
        run.read_until("step 7/")
        run.kill()
        assert run.wait().status == -signal.SIGKILL
    without_cache = tmp_path / "without cache"
    shutil.copytree(killed, without_cache, ignore=shutil.ignore_patterns("cache"))
    resumed = {killed: [*same, "--resume"], without_cache: [*same, "--resume", "--nproc", "2"]}
    train_all(config, {alone: same} | variants | resumed)
    for folder in (*variants, *resumed):
        assert digest(folder) == digest(alone), folder
        assert metrics(folder) == metrics(alone), folder


@pytest.mark.parametrize("kind", [[], ["elastic.enabled=true"]], ids=["fixed", "elastic"])
def test_a_data_set_that_changes_ends_the_run_with_its_state_saved(
    config: Path, tmp_path: Path, kind: list[str]
) -> None:
    # The file is read in parts of 1024 rows, the third of which is read ahead from step 7 on, and needed in step 18.
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("".join(f'{{"text": "{number}"}}\n' for number in range(2200)))
    sizes = ["train.global_batch_size=120", "train.micro_batch_size=60", "data.shuffle_buffer=120"]
    with Run(config, *STREAM, *sizes, *kind, "train.max_steps=20", f"data.train={source}", "--output-dir", out) as run:
        run.read_until("step 1/")
        with source.open("a") as file:
            file.write("\n")
        done = run.wait()
    assert done.status == 1
    assert f"error: {source} has changed since the run began: it had" in done.stderr
    assert checkpoints(out)[-1].name == f"step-{steps(out)[-1]:08d}"
