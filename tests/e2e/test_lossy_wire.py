"""Runs whose gradients are compressed: what is left out of them survives whatever ends a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import Run, digest, metrics, train_all


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of runs of two workers that nothing happened to, by wire."""
    folder = tmp_path_factory.mktemp("whole")
    folders = {wire: folder / wire for wire in ("fp32", "bf16", "int8", "int4")}
    train_all(config, {folder: ["--nproc", "2", f"parallel.wire={wire}"] for wire, folder in folders.items()})
    return folders


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_resumed_on_as_many_workers_it_is_the_same_run(
    config: Path, whole: dict[str, Path], tmp_path: Path, wire: str
) -> None:
    arguments, killed = ["--nproc", "2", f"parallel.wire={wire}"], tmp_path / "killed"
    with Run(config, *arguments, "--output-dir", killed) as run:
        run.read_until("step 8/")
        run.kill()
        run.wait()
    other = shutil.copytree(killed, tmp_path / "other")
    # On another number of workers the rounding differs, and nothing else.
    train_all(config, {killed: [*arguments, "--resume"], other: [*arguments, "--resume", "--nproc", "3"]})
    assert digest(killed) == digest(whole[wire])
    assert metrics(killed) == metrics(whole[wire])
    assert (other / "final").is_dir()


def test_a_lossy_wire_is_close_to_the_exact_one_and_sends_less(undisturbed: Path, whole: dict[str, Path]) -> None:
    exact = metrics(undisturbed)
    assert digest(whole["fp32"]) == digest(undisturbed)
    for wire in ("bf16", "int8"):
        assert digest(whole[wire]) != digest(undisturbed)
        losses = [line["train/loss"] for line in metrics(whole[wire]) if "train/loss" in line]
        expected = [line["train/loss"] for line in exact if "train/loss" in line]
        assert losses == pytest.approx(expected, rel=0.02)
    sent = {wire: sum(sent_bytes(folder)) for wire, folder in whole.items()}
    assert sent["int8"] < 0.7 * sent["bf16"] < 0.5 * sent["fp32"]


def sent_bytes(output_dir: Path) -> list[float]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["perf/sent_bytes"] for line in map(json.loads, lines) if "perf/sent_bytes" in line]
