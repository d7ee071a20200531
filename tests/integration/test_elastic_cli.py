"""Elastic runs on the command line: real processes, gRPC and TLS. Most workers compute nothing, to be short."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import OPENBLAS_HINT, Done, Run, digest

from mlx_distributed.cli.distributed import main as distributed
from mlx_distributed.cli.elastic import join as join_module
from mlx_distributed.cli.elastic.crew import hostname
from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.elastic.status import find
from mlx_distributed.cli.train import main as train
from mlx_distributed.elastic.journal import Journal
from mlx_distributed.elastic.protocol import CommitRecord, TermRecord

HELPERS = Path(__file__).parents[1] / "unit" / "cli" / "elastic"
LISTEN = "elastic.listen=127.0.0.1:0"
HOST = hostname()


class Command:
    """A `small_command` that is under way; `plans` are those of its workers, by rank."""

    def __init__(self, *arguments: str | Path, **plans: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(HELPERS), **plans}
        command = [sys.executable, HELPERS / "small_command.py", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        self._stdout = ""

    def read_until(self, pattern: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._stdout += line
            if found := re.search(pattern, line):
                return found[0]
        raise AssertionError(f"{pattern} never came: {self.wait()}")

    def join_string(self) -> str:
        return self.read_until(r"mlxd1[a-z2-7]+")

    def wait(self) -> Done:
        stdout, stderr = self.process.communicate(timeout=60)
        return Done(self.process.returncode, self._stdout + stdout, stderr.removeprefix(f"{OPENBLAS_HINT}\n"))


@contextlib.contextmanager
def started(*arguments: str | Path, **plans: str) -> Iterator[Command]:
    command = Command(*arguments, **plans)
    with command.process:
        try:
            yield command
        finally:
            if command.process.poll() is None:
                command.process.kill()


def finish(*arguments: str | Path, **plans: str) -> Done:
    with started(*arguments, **plans) as command:
        return command.wait()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").touch()
    path = tmp_path / "config.yaml"
    plain = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}, "output_dir": "out"}
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def taken(folder: Path) -> list[int]:
    """Steps in the journal of a run."""
    journal = Journal(folder / "coordinator.journal")
    journal.close()
    return [record.outcome.step for record in journal.records if isinstance(record, CommitRecord)]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_run_ends_when_all_steps_are_taken(run_file: Path, tmp_path: Path) -> None:
    done = finish("host", run_file, "parallel.nproc=2")
    assert (done.status, done.stderr) == (0, ""), done
    assert "mlxd1" not in done.stdout
    assert taken(tmp_path / "out") == [1, 2, 3, 4]
    assert left(tmp_path / "out") == {"config.yaml", "run.json", "coordinator.journal", "logs"}


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_dies_is_named_and_the_others_go_on(run_file: Path, tmp_path: Path, rank: int) -> None:
    plans = {"PLAN_0": "wait for 2", "PLAN_1": "wait for 2", f"PLAN_{rank}": "die at 1"}
    done = finish("host", run_file, "parallel.nproc=2", **plans)
    # The other one has ended too by the time that this is told, where it is very fast.
    said = f"error: worker {HOST}-{rank} was ended by SIGKILL(; the others go on)?\n"
    assert (done.status, bool(re.fullmatch(said, done.stderr))) == (0, True), done
    assert taken(tmp_path / "out") == [1, 2, 3, 4]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_may_have_run_out_of_memory_is_started_again_with_half(
    run_file: Path, tmp_path: Path, rank: int
) -> None:
    plans = {"PLAN_0": "stay with 2", "PLAN_1": "stay with 2", f"PLAN_{rank}": "die once at 1"}
    done = finish("host", run_file, "parallel.nproc=2", "train.memory_budget=1GB", **plans)
    assert (done.status, done.stderr) == (0, f"error: worker {HOST}-{rank} was ended by SIGKILL; the others go on\n")
    assert (
        f"worker {HOST}-{rank} may have run out of memory: it is started again, to compute micro-batches in 2 parts\n"
        in done.stdout
    )
    assert taken(tmp_path / "out") == [1, 2, 3, 4]


def test_one_that_dies_again_and_again_is_left_out(run_file: Path, tmp_path: Path) -> None:
    plans = {"PLAN_0": "stay with 2", "PLAN_1": "die at 0"}
    with started("host", run_file, "parallel.nproc=2", "train.memory_budget=1GB", **plans) as command:
        for num_parts in (2, 4, 8):
            command.read_until(f"started again, to compute micro-batches in {num_parts} parts")
        assert command.process.stderr is not None
        lines = iter(command.process.stderr.readline, "")
        assert any(f"worker {HOST}-1 is not started again, as it has died 4 times" in line for line in lines)
        command.process.send_signal(signal.SIGINT)
        assert command.wait().status == 130
    assert taken(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("plans", "status", "error"),
    [
        ({"PLAN_0": "refuse", "PLAN_1": "refuse"}, 2, "these rows are of no use"),
        ({"PLAN_0": "die"}, 1, f"worker {HOST}-0 was ended by SIGKILL"),
    ],
)
def test_what_ends_before_it_has_begun_leaves_nothing(
    run_file: Path, tmp_path: Path, plans: dict[str, str], status: int, error: str
) -> None:
    done = finish("host", run_file, "parallel.nproc=2", **plans)
    assert (done.status, done.stderr) == (status, f"error: {error}\n"), done
    assert left(tmp_path / "out") == {"run.json", "logs"}
    assert finish("host", run_file, "parallel.nproc=2").status == 0


def test_too_few_workers_give_up(run_file: Path) -> None:
    done = finish("host", run_file, "elastic.min_workers=2", "elastic.wait_s=0.5")
    assert done.status == 1
    reason = f"gave up after 0.5 s: 1 of at least 2 workers are ready to train ({HOST}-0); waiting for more"
    assert done.stderr == f"error: {reason}\n"


def test_ctrl_c_ends_all(run_file: Path, tmp_path: Path) -> None:
    with started("host", run_file, LISTEN, "parallel.nproc=2", PLAN_0="wait for 9", PLAN_1="wait for 9") as command:
        text = command.join_string()
        while len(find(text).status().members) < 2:
            pass
        command.process.send_signal(signal.SIGINT)
        done = command.wait()
    assert (done.status, done.stderr) == (130, ""), done
    assert "coordinator.json" in left(tmp_path / "out"), "others may be waiting for it"


def test_another_command_joins_and_status_shows_who_is_there(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with started("host", run_file, LISTEN, PLAN_0="wait for 3") as command:
        text = command.join_string()
        while not find(text).status().members:
            pass
        for run in (text, str(tmp_path / "out")):
            assert distributed(["status", run]) == 0
            out, err = capsys.readouterr()
            assert err == ""
            assert "step 0 of 4" in out
            assert re.search(rf"^{HOST}-0 +127\.0\.0\.1:\d+  1 ", out, re.MULTILINE), out
        folder = tmp_path / "joined"
        joined = finish("join", text, folder, "2", PLAN_0="wait for 3", PLAN_1="wait for 3")
        done = command.wait()
    assert (joined.status, joined.stderr) == (0, ""), joined
    assert (done.status, done.stderr) == (0, ""), done
    assert taken(tmp_path / "out") == [1, 2, 3, 4]
    assert left(folder) == {"config.yaml", "run.json", "logs"}
    assert (folder / "run.json").read_text().splitlines()[1:3] == (
        tmp_path / "out" / "run.json"
    ).read_text().splitlines()[1:3]
    secret = Invitation.decode(text).token
    written = [path for output in (folder, tmp_path / "out") for path in output.rglob("*") if path.is_file()]
    assert not [path for path in written if secret in path.read_text() or text in path.read_text()]


def test_a_coordinator_comes_back_to_those_who_wait(run_file: Path, tmp_path: Path) -> None:
    with started("coordinator", run_file, LISTEN) as first:
        text = first.join_string()
        with started("join", text, tmp_path / "a", "1", PLAN_0="wait for 2") as a:
            while not find(text).status().members:
                pass
            first.process.send_signal(signal.SIGINT)
            stopped = first.wait()
            assert (stopped.status, stopped.stderr.startswith("interrupted: workers hold what they have")) == (
                130,
                True,
            )
            with started("coordinator", run_file, LISTEN) as second:
                assert second.join_string() == text
                b = finish("join", text, tmp_path / "b", "1")
                assert (b.status, b.stderr) == (0, ""), b
                ended = a.wait()
                assert (ended.status, ended.stderr) == (0, ""), ended
                done = second.wait()
    assert (done.status, done.stderr) == (0, ""), done
    journal = Journal(tmp_path / "out" / "coordinator.journal")
    journal.close()
    assert [record.term for record in journal.records if isinstance(record, TermRecord)] == [1, 2]
    assert taken(tmp_path / "out") == [1, 2, 3, 4]


def test_what_does_not_fit_is_refused_in_words(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(text: str, *arguments: str) -> tuple[int, str]:
        status = train(["--join", text, "--output-dir", str(tmp_path / "joined"), *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert not (tmp_path / "joined").exists()
        return status, err

    with started("coordinator", run_file, LISTEN) as command:
        text = command.join_string()
        good = Invitation.decode(text)
        for wrong, words in (
            (text[:-5], "copy it again as a whole"),
            (replace(good, fingerprint="00" * 32).encode(), "has expired, or somebody stands in between"),
            (replace(good, token="00" * 16).encode(), "refuses the token"),
        ):
            status, error = refused(wrong)
            assert status == 2
            assert words in error
            assert good.token not in error
        status, error = refused(text, "--nproc", "0")
        assert (status, "parallel.nproc=0" in error) == (2, True)
        status, error = refused(text, "train.epochs=3")
        assert (status, "train.epochs=3 cannot stand beside --join" in error) == (2, True)
        (tmp_path / "rows.jsonl").unlink()
        status, error = refused(text)
        assert (status, f"is not on this machine: data.train.0.path={tmp_path / 'rows.jsonl'};" in error) == (2, True)
        monkeypatch.setattr(join_module, "__version__", "9.9.9")
        status, error = refused(text)
        assert (status, "was started with mlx-distributed" in error, "this is 9.9.9" in error) == (2, True, True)
    status, error = refused(text)
    assert (status, f"no coordinator answers at {good.address}" in error) == (1, True)


def test_a_folder_of_another_run_is_not_joined(run_file: Path, tmp_path: Path) -> None:
    assert finish("host", run_file, f"output_dir={tmp_path / 'other'}").status == 0
    with started("coordinator", run_file, LISTEN) as command:
        done = finish("join", command.join_string(), tmp_path / "other", "1")
    assert done.status == 2
    assert "holds the run" in done.error


def test_a_coordinator_needs_an_address(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distributed(["coordinator", "--config", str(run_file)]) == 2
    assert "error: elastic.listen is not set, so nobody could join" in capsys.readouterr().err


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("coordinator", "status"):
        with pytest.raises(SystemExit):
            distributed([verb, "--help"])
        assert f"\n  mlx-distributed {verb} " in capsys.readouterr().out


def test_a_worker_that_is_killed_changes_no_bit(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(config, "--nproc", "2", "--output-dir", folder, "elastic.enabled=true") as run:
        run.read_until("step 7/")
        os.kill(run.workers[1], signal.SIGKILL)
        done = run.wait()
    assert (done.status, done.stderr) == (0, f"error: worker {HOST}-1 was ended by SIGKILL; the others go on\n"), done
    assert digest(folder) == digest(undisturbed)
