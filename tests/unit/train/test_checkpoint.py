"""A round trip, which checkpoint is taken, and what a save replaces and removes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoint_samples import arrays, checkpointer, meta, names, no_notice, save
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.errors import CheckpointError
from mlx_distributed.train.best import from_lines, to_lines
from mlx_distributed.train.checkpoint import best, locate, newest_valid, open_checkpoint
from mlx_distributed.train.checkpoint.write import retained
from mlx_distributed.train.state import digest


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    parameters = {
        "float32": mx.random.normal((7, 3)),
        "bfloat16": mx.random.normal((5,)).astype(mx.bfloat16),
        "transposed": mx.arange(12).reshape(3, 4).T,
        "empty": mx.zeros((0, 4)),
        "scalar": mx.array(1.5),
        "lazy": mx.ones((3,)) + 1,
    }
    optimizer = {"step": mx.array(2**40 + 1, mx.uint64)}
    said = meta(12, wandb_id=None, metrics={"eval/loss": 1.25, "eval/perplexity": float("inf"), "exact": 1})
    folder = checkpointer(tmp_path / "new" / "checkpoints").save(parameters, optimizer, said)
    assert folder == tmp_path / "new" / "checkpoints" / "step-00000012"
    assert names(folder) == ["manifest.json", "optimizer.safetensors", "params.safetensors"]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.meta == replace(said, metrics={"eval/loss": 1.25, "exact": 1.0})
    loaded = checkpoint.load()
    assert (digest(loaded[0]), digest(loaded[1])) == (digest(parameters), digest(optimizer))


def test_what_is_loaded_does_not_depend_on_the_files_any_more(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    parameters, _ = open_checkpoint(folder).load()
    (folder / "params.safetensors").write_bytes(b"")
    assert digest(parameters) == digest(arrays(3)[0])


def test_a_save_needs_no_memory_for_a_copy(tmp_path: Path) -> None:
    parameters = {str(i): mx.zeros((256, 1024)) for i in range(8)}
    mx.eval(parameters)
    mx.reset_peak_memory()
    checkpointer(tmp_path).save(parameters, {}, meta(1))
    assert mx.get_peak_memory() < parameters["0"].nbytes


# Which one is taken.


def test_other_things_in_the_folder_are_not_looked_at(tmp_path: Path) -> None:
    for name in ("step-1", "step-00000009.bak", "step-0000000x", ".step-00000008.tmp", "mystep-00000007"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes-step-1.txt").write_text("")
    assert newest_valid(tmp_path, no_notice) is None
    assert newest_valid(tmp_path / "missing", no_notice) is None
    assert best(tmp_path, no_notice) is None


def test_the_best_is_the_first_of_the_lowest_loss(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, None)):
        save(tmp_path, step, metrics={} if loss is None else {"eval/loss": loss})
    found = best(tmp_path, no_notice)
    assert found is not None
    assert found.meta.step == 2
    assert checkpointer(tmp_path).best_metric() == 2.0
    assert checkpointer(tmp_path / "missing").best_metric() is None


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    found = newest_valid(tmp_path, no_notice)
    assert found is not None
    assert found.meta.step == 100_000_000


def test_a_path_may_be_a_checkpoint_an_output_dir_or_its_checkpoints(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 1)
    newest = save(tmp_path / "checkpoints", 2)
    assert locate(folder, no_notice).folder == folder
    assert locate(tmp_path, no_notice).folder == newest
    assert locate(tmp_path / "checkpoints", no_notice).folder == newest
    renamed = folder.rename(tmp_path / "my favourite")
    assert locate(renamed, no_notice).meta.step == 1
    os.truncate(newest / "params.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        locate(tmp_path, lambda _: None)
    with pytest.raises(CheckpointError, match=r"missing is not a whole checkpoint: manifest.json: No such file"):
        locate(tmp_path / "missing", no_notice)


def test_what_resume_means(tmp_path: Path) -> None:
    checkpoints = checkpointer(tmp_path)
    assert checkpoints.find("auto") is None
    for which, said in (("last", "no whole checkpoint in"), ("best", "no whole evaluated checkpoint in")):
        with pytest.raises(CheckpointError, match=f"--resume {which}: there is {said}"):
            checkpoints.find(which)
    first = save(tmp_path, 1, metrics={"eval/loss": 1.0})
    save(tmp_path, 2)
    for which, step in (("auto", 2), ("last", 2), ("best", 1), (str(first), 1)):
        found = checkpoints.find(which)
        assert found is not None
        assert found.meta.step == step


# What a save replaces and removes.


def test_an_equal_checkpoint_is_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, metrics={"eval/loss": 1.0})
    before = (folder / "manifest.json").stat()
    assert save(tmp_path, 5) == folder
    assert save(tmp_path, 5, metrics={"eval/loss": 1.0}) == folder
    assert (folder / "manifest.json").stat() == before
    assert names(tmp_path) == ["step-00000005"]


def test_a_checkpoint_with_other_arrays_or_new_metrics_is_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, metrics={"eval/loss": 1.0})
    save(tmp_path, 5, metrics={"eval/loss": 1.0, "eval/exact_match": 0.5})
    assert open_checkpoint(folder).meta.metrics == {"eval/loss": 1.0, "eval/exact_match": 0.5}
    checkpointer(tmp_path).save(*arrays(6), meta(5))
    assert digest(open_checkpoint(folder).load()[0]) == digest(arrays(6)[0])
    os.truncate(folder / "params.safetensors", 100)
    save(tmp_path, 5)
    assert digest(open_checkpoint(folder).load()[0]) == digest(arrays(5)[0])
    assert names(tmp_path) == ["step-00000005"]


def test_a_save_tidies_up_after_a_killed_one(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / ".step-00000001.old")
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / ".step-00000002.tmp" / "params.safetensors").write_text("half of it")
    found = newest_valid(tmp_path, no_notice)
    assert found is not None
    assert found.folder.name == ".step-00000001.old"
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert open_checkpoint(tmp_path / "step-00000001").meta.step == 1


def test_old_checkpoints_are_removed_but_what_cannot_be_read_stays(tmp_path: Path) -> None:
    torn = save(tmp_path, 1)
    os.truncate(torn / "params.safetensors", 100)
    keeper = checkpointer(tmp_path, save_total_limit=2, keep_best=True)
    for step, loss in ((2, 1.0), (3, 0.5), (4, 0.7), (5, 0.6)):
        keeper.save(*arrays(step), meta(step, metrics={"eval/loss": loss}))
    assert names(tmp_path) == [f"step-0000000{step}" for step in (1, 3, 4, 5)]


def test_what_was_just_saved_stays_even_if_later_steps_exist(tmp_path: Path) -> None:
    save(tmp_path, 8)
    save(tmp_path, 9)
    checkpointer(tmp_path, save_total_limit=1).save(*arrays(2), meta(2))
    assert names(tmp_path) == ["step-00000002", "step-00000009"]


@pytest.mark.parametrize(
    ("losses", "limit", "keep_best", "expected"),
    [
        ({}, 1, True, set()),
        ({1: None}, 1, True, {1}),
        ({1: None, 2: None, 3: None}, 2, True, {2, 3}),
        ({1: None, 2: None, 3: None}, None, False, {1, 2, 3}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 1, False, {3}),
        ({1: 0.1, 2: 0.2, 3: 0.3}, 1, True, {1, 3}),
        ({1: 0.3, 2: 0.2, 3: 0.1}, 1, True, {3}),
        ({1: 0.2, 2: 0.1, 3: 0.1, 4: None}, 1, True, {2, 4}),
        ({30: 0.5, 4: 0.1, 200: None}, 2, True, {4, 30, 200}),
        ({1: 0.1, 2: 0.2}, 5, True, {1, 2}),
    ],
)
def test_retained(losses: dict[int, float | None], limit: int | None, keep_best: bool, expected: set[int]) -> None:
    assert retained(losses, limit, keep_best) == expected


@given(st.dictionaries(st.integers(0, 50), st.none() | st.floats(0, 9)), st.integers(1, 5), st.booleans())
def test_the_newest_is_always_retained(losses: dict[int, float | None], limit: int, keep_best: bool) -> None:
    keep = retained(losses, limit, keep_best)
    assert keep <= losses.keys()
    assert set(sorted(losses)[-limit:]) <= keep
    assert len(keep) <= limit + keep_best


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved in .*file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_evaluations_go_with_a_checkpoint(tmp_path: Path) -> None:
    evaluations = {10: 2.5, 20: math.inf, 30: 1.5}
    folder = save(tmp_path, 30, evaluations=to_lines("eval/loss", evaluations))
    lines = open_checkpoint(folder).meta.evaluations
    assert lines == ({"step": 10, "eval/loss": 2.5}, {"step": 20, "eval/loss": None}, {"step": 30, "eval/loss": 1.5})
    assert from_lines("eval/loss", lines).keys() == evaluations.keys()


@pytest.mark.parametrize(
    "wrong", [{}, None, [1], [{"eval/loss": 1.0}], [{"step": -1}], [{"step": 1, "eval/loss": "x"}]]
)
def test_evaluations_that_cannot_be_right_are_refused(tmp_path: Path, wrong: object) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["meta"]["evaluations"] = wrong
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="a value that cannot be right: evaluations"):
        open_checkpoint(folder)
