"""metrics.jsonl: strict JSON, and after a kill and a resume the same bytes as without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.errors import ConfigError, TrainingError
from mlx_distributed.tracking import JsonlTracker


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def write(path: Path, rows: list[tuple[int, dict[str, float]]], resume_step: int | None = None) -> None:
    tracker = JsonlTracker(path, resume_step)
    for step, metrics in rows:
        tracker.log(metrics, step)
    tracker.finish(0)


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"train/loss": 1.93, "train/num_tokens": 812}, 12)
    assert path.read_text() == '{"step": 12, "train/loss": 1.93, "train/num_tokens": 812}\n'
    tracker.message("a sample")
    tracker.checkpoint(tmp_path, 12, ["latest"])
    tracker.finish(0)
    assert path.read_text().count("\n") == 1


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", [(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})])
    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": None, "d": 0.0}


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    write(path, [(7, {})])
    assert path.read_text() == '{"step": 7}\n'


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", [(8, {})], resume_step=7)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 8}\n'


def test_what_is_told_again_stands_there_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path)
    rows = [(1, {"train/loss": 2.0}), (1, {"eval/loss": 2.5}), (2, {"train/loss": 1.0}), (2, {"eval/loss": 1.5})]
    for step, metrics in rows[:3]:
        tracker.log(metrics, step)
    tracker.rewind(1)
    for step, metrics in rows[2:]:
        tracker.log(metrics, step)
    tracker.finish(0)
    write(tmp_path / "undisturbed", [*rows])
    assert path.read_text() == (tmp_path / "undisturbed").read_text()


@pytest.mark.parametrize(("known", "kept"), [((), 1), (("eval/loss",), 2), (None, 2)])
def test_evaluations_that_are_known_are_kept(tmp_path: Path, known: tuple[str, ...] | None, kept: int) -> None:
    path = tmp_path / "m.jsonl"
    write(path, [(1, {"train/loss": 2.0}), (1, {"eval/loss": 2.5}), (2, {"train/loss": 1.0})])
    JsonlTracker(path, 1, known).finish(0)
    assert path.read_text().count("\n") == kept


@pytest.mark.parametrize("damage", ["not json\n", "[1]\n", "{}\n", '{"step": null}\n', '{"step": 1', '{"step": 1}'])
def test_damaged_lines_are_dropped_and_whole_ones_kept(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + damage)
    write(path, [(3, {})], resume_step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert list(tmp_path.iterdir()) == [path]


@given(data=st.data(), steps=st.lists(st.integers(0, 30), min_size=1, max_size=12).map(sorted))
def test_killed_anywhere_and_resumed_equals_undisturbed(data: st.DataObject, steps: list[int]) -> None:
    rows = [(step, {"train/loss": 1 / (step + 1)}) for step in steps]
    checkpoint = data.draw(st.sampled_from(steps))
    with TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        write(undisturbed, rows)
        whole = undisturbed.read_bytes()
        saved = sum(len(line) for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= checkpoint)
        killed.write_bytes(whole[: data.draw(st.integers(saved, len(whole)))])
        write(killed, [row for row in rows if row[0] > checkpoint], resume_step=checkpoint)
        assert killed.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/m\.jsonl cannot be written \(.+\); choose another output_dir"):
        JsonlTracker(tmp_path / "file" / "m.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is always full is Linux's")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    with pytest.raises(TrainingError, match=r"step 5 .*m\.jsonl \(No space left on device\).*--resume"):
        tracker.log({"train/loss": 1.0}, 5)
    tracker.finish(1)


# Generated answers.


def answers(step: int) -> list[dict[str, Any]]:
    return [{"row": row, "generated": f"{row} at {step}", "eval/bleu": math.nan} for row in range(2)]


def lines_of(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [(line["step"], line["generated"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(("known", "kept"), [((), [1]), (("eval/bleu",), [1, 2]), (None, [1, 2])])
def test_answers_are_resumed_with_their_metrics(tmp_path: Path, known: tuple[str, ...] | None, kept: list[int]) -> None:
    first = JsonlTracker(tmp_path / "metrics.jsonl")
    assert not (tmp_path / "samples.jsonl").exists()
    for step in (1, 2, 3):
        first.samples(answers(step), step)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 1')
    first.finish(130)
    second = JsonlTracker(tmp_path / "metrics.jsonl", 2, known)
    for step in {2, 3} - set(kept):
        second.samples(answers(step), step)
    assert lines_of(tmp_path) == [(step, f"{row} at {step}") for step in (1, 2, 3) for row in range(2)]
    second.rewind(1)
    second.finish(0)
    assert lines_of(tmp_path) == [(1, "0 at 1"), (1, "1 at 1")]
    assert '"eval/bleu": null' in (tmp_path / "samples.jsonl").read_text()


def test_a_new_run_has_no_answers_of_another(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    JsonlTracker(tmp_path / "metrics.jsonl").finish(0)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is always full is Linux's")
def test_a_disk_that_is_too_full_for_answers_is_named(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"answers of step 5 .*samples\.jsonl \(No space left on device\)"):
        tracker.samples(answers(5), 5)
    tracker.finish(1)
