"""Workers and coordinators are killed, stopped and joined: the model has the bits of a run that nothing happened to."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import (
    NUM_STEPS,
    Command,
    assert_exactly_once,
    checkpoints,
    commits,
    digest,
    ends_within,
    epochs,
    metrics,
    steps,
    train,
    train_all,
)

from mlx_distributed.cli.elastic.invitation import Invitation

ELASTIC = ["elastic.enabled=true", "--nproc"]
OPEN = "elastic.listen=127.0.0.1:0"
LONG = 120
"""Steps of a run that somebody joins: a worker that starts takes as long as some 20 of them, on a busy machine 60."""


def elastic(config: Path, output_dir: Path, nproc: int, *arguments: str) -> Command:
    """A run with a coordinator and workers in one command."""
    return Command("mlx-train", "--config", config, "--output-dir", output_dir, *ELASTIC, str(nproc), *arguments)


def join(text: str, output_dir: Path) -> Command:
    """One more worker."""
    return Command("mlx-train", "--join", text, "--output-dir", output_dir)


def send(number: signal.Signals, rank: int, output_dir: Path, workers: Sequence[int]) -> str:
    """Send a signal to the process that is a rank of the present epoch; returns its name in the run.

    Args:
        number: of the signal.
        rank: in the epoch.
        output_dir: of the coordinator.
        workers: process ids in the order in which they were started.
    """
    name = epochs(output_dir)[-1][rank]
    os.kill(workers[int(name.rpartition("-")[2])], number)
    return name


def assert_undisturbed(
    coordinated: Path, undisturbed: Path, trained: Sequence[Path] | None = None, num_steps: int = NUM_STEPS
) -> None:
    """Weights, moments and metrics are those of the other run, and every step was taken, and every row trained, once.

    Args:
        coordinated: output of the coordinator.
        undisturbed: of the run to compare with.
        trained: of those that were rank 0 one after the other, where that is not `coordinated`.
        num_steps: of both.
    """
    trained = trained or [coordinated]
    assert commits(coordinated) == list(range(1, num_steps + 1))
    assert_exactly_once(coordinated, trained)
    assert digest(trained[-1]) == digest(undisturbed)
    told = [line for folder in trained for line in metrics(folder)]
    # A new rank 0 tells of the last step once more, as the one before may have been lost before it could.
    assert [line for place, line in enumerate(told) if line not in told[:place]] == metrics(undisturbed)
    for folder in trained:
        assert len(set(steps(folder))) == len(steps(folder))


@pytest.mark.parametrize("ranks", [[1], [0], [0, 1]], ids=["another", "rank 0", "two of three"])
def test_kill_of_workers(config: Path, undisturbed: Path, tmp_path: Path, ranks: list[int]) -> None:
    out = tmp_path / "out"
    with elastic(config, out, 3) as run:
        lost = []
        run.read_until("step 3/")
        workers = run.workers
        for rank in ranks:
            lost.append(send(signal.SIGKILL, rank, out, workers))
            run.wait_until(lambda lost=lost: not set(lost) & set(epochs(out)[-1]))
        done = run.wait()
    assert done.status == 0, done
    for name in lost:
        assert f"error: worker {name} was ended by SIGKILL; the others go on\n" in done.stderr, done
    assert f"step {NUM_STEPS}/{NUM_STEPS}  loss" in done.stdout, done
    assert "the model is in" in done.stdout, done
    assert_undisturbed(out, undisturbed)


def test_stop_join_return_and_kill(config: Path, tmp_path: Path) -> None:
    out, undisturbed, joined = (tmp_path / name for name in ("out", "undisturbed", "joined"))
    length = [f"train.max_steps={LONG}", "checkpoint.steps=null"]
    with elastic(config, out, 3, OPEN, *length) as run:
        text = run.join_string()
        run.read_until("step 2/")
        workers = run.workers
        stopped = send(signal.SIGSTOP, 1, out, workers)
        with join(text, joined) as newcomer:
            run.wait_until(lambda: stopped not in epochs(out)[-1])
            num_taken = len(commits(out))
            run.wait_until(lambda: len(commits(out)) > num_taken)
            os.kill(workers[int(stopped.rpartition("-")[2])], signal.SIGCONT)
            run.wait_until(lambda: len(epochs(out)[-1]) == 4)
            num_taken = len(commits(out))
            assert num_taken < LONG
            send(signal.SIGKILL, 0, out, workers)
            run.wait_until(lambda: len(commits(out)) > num_taken)
            done, other = run.wait(), newcomer.wait()
    assert done.status == 0, done
    assert (other.status, other.stderr) == (0, ""), other
    train_all(config, {undisturbed: length})
    assert_undisturbed(out, undisturbed, num_steps=LONG)


def test_the_newcomer_ends_what_others_began(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, joined = tmp_path / "out", tmp_path / "joined"
    with elastic(config, out, 1, OPEN, "elastic.min_workers=2") as run:
        text = run.join_string()
        with join(text, joined) as newcomer:
            run.read_until("step 7/")
            (worker,) = run.workers
            os.kill(worker, signal.SIGKILL)
            run.read_until("1 of at least 2 workers are ready")
            with join(text, tmp_path / "third") as third:
                done = newcomer.wait(), third.wait(), run.wait()
    assert [each.status for each in done] == [0, 0, 0], done
    assert_undisturbed(out, undisturbed, [out, joined])


def test_kill_of_the_coordinator(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    out, first, second = (tmp_path / name for name in ("out", "first", "second"))
    command = ("mlx-distributed", "coordinator", "--config", config, "--output-dir", out, OPEN)
    arguments = (*command[1:], "elastic.min_workers=2")
    with Command(command[0], *arguments) as killed:
        text = killed.join_string()
        with join(text, first) as one, join(text, second) as two:
            killed.wait_until(lambda: len(commits(out)) >= 7)
            killed.kill()
            killed.wait()
            num_taken = len(commits(out))
            assert num_taken < NUM_STEPS
            with Command(command[0], *arguments) as again:
                assert again.join_string() == text
                done = one.wait(), two.wait(), again.wait()
    assert [(each.status, each.stderr) for each in done] == [(0, "")] * 3, done
    leaders = [folder for folder in (first, second) if (folder / "metrics.jsonl").exists()]
    leaders.sort(key=lambda folder: (folder / "final").exists())
    assert_undisturbed(out, undisturbed, leaders)


def test_refused(config: Path, tmp_path: Path) -> None:
    with elastic(config, tmp_path / "out", 1, OPEN, "elastic.min_workers=2") as run:
        text = run.join_string()
        right = Invitation.decode(text)
        strangers = {
            "another token": Invitation(right.address, right.token[::-1], right.fingerprint).encode(),
            "another certificate": Invitation(right.address, right.token, right.fingerprint[::-1]).encode(),
            "not as a whole": text[:-3],
            "something else": "https://example.org",
        }
        for what, string in strangers.items():
            with join(string, tmp_path / what) as stranger:
                done = stranger.wait()
            assert done.status == 2, done
            assert "\n" not in done.error.strip(), done


@pytest.mark.timeout(20)
def test_ctrl_c_while_workers_are_missing(config: Path, tmp_path: Path) -> None:
    with elastic(config, tmp_path / "out", 1, "elastic.min_workers=2") as run:
        run.read_until("1 of at least 2 workers are ready")
        run.interrupt()
        assert run.wait().status == 130


def test_stopped_killed_and_resumed(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with elastic(config, out, 3) as run:
        run.read_until("step 2/")
        workers = run.workers
        name = send(signal.SIGSTOP, 1, out, workers)
        time.sleep(2.0)  # A hiccup, which is forgiven.
        os.kill(workers[int(name.rpartition("-")[2])], signal.SIGCONT)
        run.read_until("step 4/")
        assert len(epochs(out)) == 1
        run.interrupt()
        done = run.wait()
    assert (done.status, done.stderr) == (130, "")
    last = len(commits(out))
    assert f"interrupted: step {last} is saved, --resume goes on from there\n" in done.stdout
    with elastic(config, out, 2, "--resume") as run:
        run.read_until(f"step {last + 4}/")
        workers = run.workers
        run.kill()
        run.wait()
        assert all(ends_within(pid, 5.0) for pid in workers)
    done = train(config, "--resume", "--output-dir", out, *ELASTIC, "1")
    assert (done.status, done.stderr) == (0, "")
    assert digest(out) == digest(undisturbed)
    assert metrics(out) == metrics(undisturbed)


def test_a_sharded_optimizer_outlives_workers_one_after_the_other(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, shard = tmp_path / "out", "optimizer.shard=true"
    with elastic(config, out, 4, shard) as run:
        run.read_until("step 2/")
        workers = run.workers
        for rank in (2, 0):
            lost = send(signal.SIGKILL, rank, out, workers)
            run.wait_until(lambda lost=lost: lost not in epochs(out)[-1])
            num_taken = len(commits(out))
            run.wait_until(lambda num_taken=num_taken: len(commits(out)) > num_taken)
        run.interrupt()
        assert run.wait().status == 130
    done = train(config, "--resume", "--output-dir", out, *ELASTIC, "3", shard)
    assert (done.status, done.stderr) == (0, "")
    assert digest(out) == digest(undisturbed)
    assert metrics(out) == metrics(undisturbed)


def test_workers_that_agree_now_and_then(config: Path, tmp_path: Path) -> None:
    out, loose = tmp_path / "out", ["parallel.sync=diloco", "parallel.diloco.sync_every=2"]
    loose += ["parallel.diloco.fragments=1", "eval.steps=null"]
    with elastic(config, out, 3, *loose) as run:
        run.read_until("step 2/")
        lost = send(signal.SIGKILL, 0, out, run.workers)
        run.wait_until(lambda: lost not in epochs(out)[-1])
        num_taken = len(commits(out))
        run.wait_until(lambda: len(commits(out)) > num_taken)
        run.interrupt()
        assert run.wait().status == 130
    done = train(config, "--resume", "--output-dir", out, *ELASTIC, "2", *loose)
    assert (done.status, done.stderr) == (0, "")
    rounds = [*range(2, NUM_STEPS, 2), NUM_STEPS]
    assert commits(out) == list(range(1, len(rounds) + 1))
    assert steps(out) == rounds


def test_who_is_left_by_all_others_for_good_saves_and_says_how_to_go_on(config: Path, tmp_path: Path) -> None:
    out, joined = tmp_path / "out", tmp_path / "joined"
    patience = [
        "elastic.coordinator_grace_s=0.5",
        "elastic.wait_s=0.5",
        "train.max_steps=1000",
        "checkpoint.steps=null",
    ]
    with elastic(config, out, 1, OPEN, *patience) as run, join(run.join_string(), joined) as left:
        for _ in range(2):
            left.read_until("step ")
        leader = epochs(out)[-1][0]
        run.kill()
        done = left.wait()
    assert done.status == 1
    words = (
        rf"no coordinator has answered at 127\.0\.0\.1:\d+ for \d+ s .* its model is in the output folder of {leader}\."
    )
    assert re.match(words, done.error), done
    (step,) = re.findall(r"This worker has step (\d+) of 1000, and what it has saved is in .*/joined;", done.error)
    assert [folder.name for folder in checkpoints(joined)][-1] == f"step-{int(step):08}"
