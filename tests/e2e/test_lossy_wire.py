"""Runs whose gradients are compressed: what is left out of them survives whatever ends a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import Run, digest, metrics, train, train_all


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_resumed_on_as_many_workers_it_is_the_same_run(config: Path, tmp_path: Path, wire: str) -> None:
    arguments = ["--nproc", "2", f"parallel.wire={wire}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_all(config, {whole: arguments})
    with Run(config, *arguments, "--output-dir", killed) as run:
        run.read_until("step 8/")
        run.kill()
        run.wait()
    other = shutil.copytree(killed, tmp_path / "other")
    train_all(config, {killed: [*arguments, "--resume"]})
    assert digest(killed) == digest(whole)
    assert metrics(killed) == metrics(whole)
    # On another number of workers the rounding differs, and nothing else.
    done = train(config, "--resume", "--nproc", "3", f"parallel.wire={wire}", "--output-dir", other)
    assert done.status == 0, done
    assert (other / "final").is_dir()


def test_a_lossy_wire_is_close_to_the_exact_one_and_sends_less(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folders = {wire: tmp_path / wire for wire in ("fp32", "bf16", "int8")}
    train_all(config, {folder: ["--nproc", "2", f"parallel.wire={wire}"] for wire, folder in folders.items()})
    exact = metrics(undisturbed)
    assert digest(folders["fp32"]) == digest(undisturbed)
    for wire in ("bf16", "int8"):
        assert digest(folders[wire]) != digest(undisturbed)
        losses = [line["train/loss"] for line in metrics(folders[wire]) if "train/loss" in line]
        expected = [line["train/loss"] for line in exact if "train/loss" in line]
        assert losses == pytest.approx(expected, rel=0.02)
    sent = {wire: sum(sent_bytes(folder)) for wire, folder in folders.items()}
    assert sent["int8"] < 0.7 * sent["bf16"] < 0.5 * sent["fp32"]


def sent_bytes(output_dir: Path) -> list[float]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["perf/sent_bytes"] for line in map(json.loads, lines) if "perf/sent_bytes" in line]
