from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import CONFIG, Run, write_rows

from mlx_distributed.cli.local import (
    OPENBLAS_HINT,
    LocalGroup,
    Worker,
    find_openblas,
    worker_environment,
    worker_jobs,
)

DEFAULTS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GRPC_VERBOSITY": "NONE",
}
GLIBC = {"MALLOC_ARENA_MAX": "1"}


def test_a_worker_has_one_thread_of_each_kind() -> None:
    environ = {"HOME": "/home/me", "LD_PRELOAD": "mine.so"}
    env, hint = worker_environment(environ, "linux")
    assert env == environ | DEFAULTS | GLIBC
    assert hint is None
    assert environ == {"HOME": "/home/me", "LD_PRELOAD": "mine.so"}


@pytest.mark.parametrize("name", [*DEFAULTS, *GLIBC, "LD_PRELOAD"])
@pytest.mark.parametrize("value", ["7", ""])
def test_what_the_user_has_set_is_left_alone(name: str, value: str) -> None:
    env, _ = worker_environment({name: value}, "linux")
    assert env[name] == value


def test_openblas_is_preloaded_where_it_is_installed_and_named_where_not() -> None:
    env, hint = worker_environment({}, "linux")
    assert (env.get("LD_PRELOAD"), hint) in {(find_openblas(), None), (None, OPENBLAS_HINT)}
    if hint is None:
        done = subprocess.run([sys.executable, "-c", "print(1)"], env=env, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("1\n", "")  # the loader warns of what it cannot preload


def test_a_mac_needs_no_openblas() -> None:
    assert worker_environment({}, "darwin") == (DEFAULTS, None)


def write_config(folder: Path) -> Path:
    """Two workers accept it, and would then look for the model."""
    write_rows(folder / "rows.jsonl")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"parallel": {"nproc": 2}}))
    return folder / "config.yaml"


def make_jobs(config_file: Path, num_workers: int) -> list[dict[str, Any]]:
    job = {"config_file": str(config_file), "run_id": "r", "wandb_id": "w", "resume": None}
    return worker_jobs(job | {"eval_only": False}, num_workers, "s")


def run_group(folder: Path, jobs: list[dict[str, Any]], **env: str) -> int:
    """As `mlx-train` does: the output of rank 0 stays on the console."""
    logs = [None, *(folder / f"rank-{rank}.log" for rank in range(1, len(jobs)))]
    return LocalGroup(jobs, logs, {**os.environ, **env}).run()


def at_start(folder: Path, code: str) -> str:
    """A PYTHONPATH that makes every new process run this first."""
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)


@pytest.mark.parametrize(("number", "hinted"), [("SIGSEGV", True), ("SIGABRT", False)])
def test_what_takes_less_memory_is_said_where_that_may_help(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: str, hinted: bool
) -> None:
    env = {**os.environ, "PYTHONPATH": at_start(tmp_path, f"import os, signal; os.kill(os.getpid(), signal.{number})")}
    assert LocalGroup(make_jobs(write_config(tmp_path), 1), [None], env).train() == 1
    error, *hint = capfd.readouterr().err.splitlines()
    assert error == f"error: worker 0 was ended by {number}"
    assert [line.startswith("hint: a worker that is ended so has often run out of memory") for line in hint] == (
        [True] if hinted else []
    )


def test_what_all_workers_refuse_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_group(tmp_path, make_jobs(tmp_path / "gone.yaml", 2)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: The configuration ")
    assert "gone.yaml: No such file or directory" in err
    assert err.count("error: ") == 1
    assert (tmp_path / "rank-1.log").read_text() == err
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_one_worker_refuses_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = make_jobs(write_config(tmp_path), 2)
    jobs[1]["config_file"] = str(tmp_path / "gone.yaml")
    assert run_group(tmp_path, jobs) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("error: ")) == ("", 1), err
    assert "gone.yaml: No such file or directory" in err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os._exit(7)", "ended with status 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "was ended by SIGABRT"),
    ],
)
def test_a_worker_that_cannot_speak_is_spoken_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, said: str
) -> None:
    jobs = make_jobs(write_config(tmp_path), 1)
    assert run_group(tmp_path, jobs, PYTHONPATH=at_start(tmp_path, code)) == 1
    assert capfd.readouterr() == ("", f"error: worker 0 {said}\n")


def test_a_worker_with_a_log_file_is_spoken_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log_file = tmp_path / "rank-1.log"
    code = f"import os; os.path.samestat(os.fstat(1), os.stat({str(log_file)!r})) and os._exit(7)"
    jobs = make_jobs(write_config(tmp_path), 2)
    assert run_group(tmp_path, jobs, PYTHONPATH=at_start(tmp_path, code)) == 1
    assert capfd.readouterr() == ("", f"error: worker 1 ended with status 7; see {log_file}\n")


def test_a_bug_in_a_worker_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (job,) = make_jobs(tmp_path / "any.yaml", 1)
    del job["config_file"]
    assert run_group(tmp_path, [job]) == 1
    err = capfd.readouterr().err
    assert "KeyError: 'config_file'" in err
    assert err.endswith("\nerror: worker 0 ended with status 1\n")


def test_a_worker_without_a_job_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "mlx_distributed.cli.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    ours.close()
    assert process.wait(timeout=60) == 1


@pytest.mark.parametrize("status", [0, 130])
def test_a_good_end_needs_no_words(status: int) -> None:
    with subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"]) as process:
        process.wait()
    assert Worker(0, process, None, None).ending() is None  # type: ignore[arg-type]  # nothing is said over the line


def test_ctrl_c_while_the_workers_are_starting(tmp_path: Path) -> None:
    """They import for a second or two before they can handle a signal."""
    with Run(write_config(tmp_path)) as run:
        run.spin_until(lambda: run.workers)
        run.interrupt()
        done = run.wait()
    assert (done.status, done.stdout, done.stderr) == (130, "", "")
