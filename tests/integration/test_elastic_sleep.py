"""A machine goes to sleep, another worker gets SIGTERM, and the first wakes up: the model has the undisturbed bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support import NUM_STEPS, Command, commits, digest, epochs, journal

from mlx_distributed.cli.elastic.crew import hostname
from mlx_distributed.elastic.protocol import EpochRecord

HELPERS = Path(__file__).parents[1] / "unit" / "cli" / "elastic"


def test_a_worker_leaves_before_its_machine_sleeps_and_comes_back(
    config: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    out, names = tmp_path / "out", [f"{hostname()}-{rank}" for rank in range(3)]
    overrides = ["parallel.nproc=3", "elastic.min_workers=2", f"output_dir={out}"]
    with Command("python", HELPERS / "sleepy_run.py", config, *overrides) as run:
        run.read_until("step 3/")
        workers = run.workers
        os.kill(workers[1], signal.SIGUSR1)
        run.wait_until(lambda: names[1] not in epochs(out)[-1])
        num_taken = len(commits(out))
        run.wait_until(lambda: len(commits(out)) > num_taken)
        os.kill(workers[0], signal.SIGTERM)
        run.read_until("1 of at least 2 workers are ready")
        os.kill(workers[1], signal.SIGUSR2)
        done = run.wait()
    # The other two go on without a wait, with what the one that leaves had computed of the step taken over.
    assert (done.status, done.stderr) == (0, f"error: worker {names[0]} was ended by SIGTERM; the others go on\n"), done
    formed = [record.epoch for record in journal(out) if isinstance(record, EpochRecord)]
    assert [[seat.worker.name for seat in epoch.seats] for epoch in formed][1:] == [names[::2], [names[2], names[1]]]
    assert formed[1].reason == f"{names[1]} has left (its machine goes to sleep)"
    assert formed[2].reason == f"{names[0]} has left (it was asked to end)"
    assert commits(out) == list(range(1, NUM_STEPS + 1))
    assert digest(out) == digest(undisturbed)
