"""One of three workers dies or stops in the middle of a step: the others end in time and say why. Nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from support import Run, digest, ends_within, metrics, train

TIMEOUT_S = 3.0


def slowest_step_s(output_dir: Path) -> float:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line).get("perf/step_s", 0.0) for line in lines)


@pytest.mark.parametrize(
    ("lost", "number"),
    [(0, signal.SIGKILL), (2, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["first killed", "last killed", "middle stopped"],
)
def test_a_lost_worker(config: Path, undisturbed: Path, tmp_path: Path, lost: int, number: signal.Signals) -> None:
    folder = tmp_path / "out"
    arguments = ["--nproc", "3", f"parallel.timeout_s={TIMEOUT_S}", "checkpoint.steps=2", "--output-dir", folder]
    with Run(config, *arguments) as run:
        run.read_until("step 7/")
        others = run.workers
        os.kill(others.pop(lost), number)
        lost_s = time.monotonic()
        # A stopped worker is waited for once the others have done their part of the step.
        limit_s = TIMEOUT_S + 1.0 + (slowest_step_s(folder) if number == signal.SIGSTOP else 0.0)
        for pid in others:
            assert ends_within(pid, limit_s - (time.monotonic() - lost_s)), f"{time.monotonic() - lost_s:.1f} s"
        done = run.wait()

    assert done.status == 1
    assert "Traceback" not in done.stdout + done.stderr
    said = done.stderr.partition("\n")[0]
    assert re.fullmatch(rf"error: all_reduce of the .* of step \d+ failed after \d\.\d s: rank {lost}: .*", said), said
    digest(folder)  # fails where the newest checkpoint is not whole

    done = train(config, "--resume", "--nproc", "2", "--output-dir", folder)
    assert done.status == 0, done
    assert digest(folder) == digest(undisturbed)
    assert metrics(folder) == metrics(undisturbed)
