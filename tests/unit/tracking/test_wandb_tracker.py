"""W&B for real, offline: what it recorded is read back. Online only against a loopback port that nobody listens on."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_log import keep_from_home, read_runs

from mlx_distributed.config import Config, DataConfig, SourceConfig, WandbConfig, to_dict
from mlx_distributed.tracking import WandbTracker, new_wandb_id, open_tracker

OFFLINE = WandbConfig(project="p", mode="offline")
ONLINE = WandbConfig(project="p", log_checkpoints=True)
WAIT_S = 20.0


def services(parent: int) -> list[int]:
    """Process ids of the wandb services that `parent` has started."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "ppid=,pid=,command="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    return [int(pid) for ppid, pid, command in rows if int(ppid) == parent and "wandb-core --" in command]


@pytest.fixture(autouse=True)
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which wandb has never run, and on which nothing of it is left when the test is over."""
    home = tmp_path / "home"
    keep_from_home(home, monkeypatch)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        yield home
    for thread in threading.enumerate():
        if thread.name == "wandb-tracker":
            thread.join(WAIT_S)
    assert services(os.getpid()) == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


def contents(artifact: Any) -> dict[str, str]:
    """Of the files of an artifact that waits to be sent."""
    return {entry.path: Path(entry.local_path).read_text() for entry in artifact.manifest.contents}


def track(config: WandbConfig, folder: Path, steps: range, checkpoint: Path, timeout_s: float = 60.0) -> list[str]:
    """A short run; returns the lines for people."""
    notices: list[str] = []
    tracker = WandbTracker(config, "abcd1234", {"seed": 7}, folder, notify=notices.append, timeout_s=timeout_s)
    for step in steps:
        tracker.log({"train/loss": 1 / step}, step)
    tracker.message("not for W&B")
    tracker.checkpoint(checkpoint, steps[-1], ["latest"])
    tracker.finish(0)
    tracker.log({"train/loss": 0.0}, steps[-1] + 1)
    return notices


def test_an_offline_run_records_what_metrics_jsonl_has(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = WandbConfig(
        project="p", mode="offline", name="a run", group="g", tags=("x", "y"), entity="e", log_checkpoints=True
    )
    config = Config(output_dir=tmp_path / "run", wandb=wandb)
    run_id = new_wandb_id()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with open_tracker(config, 3, run_id) as tracker:
        for step in (1, 2, 3):
            tracker.log({"train/loss": 1 / step, "train/num_tokens": 812, "train/grad_norm": math.nan}, step)
        tracker.log({"eval/loss": 0.5}, 3)
        tracker.checkpoint(checkpoint, 3, ["latest", "best", "step-3"])
        tracker.finish(130)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    [recorded] = read_runs(config.output_dir / "wandb")
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    history = [{name: None if math.isnan(value) else value for name, value in row.items()} for row in recorded.history]
    assert history == lines
    assert len(lines) == 4
    run = recorded.run
    assert (run.run_id, run.project, run.entity, run.display_name, run.run_group) == (run_id, "p", "e", "a run", "g")
    assert list(run.tags) == ["x", "y"]
    assert recorded.config == json.loads(json.dumps(to_dict(config)))
    assert recorded.exit_code == 130
    [artifact] = recorded.artifacts
    assert (artifact.name, artifact.type) == (f"{run_id}-checkpoint", "model")
    assert sorted(artifact.aliases) == ["best", "latest", "step-3"]
    assert json.loads(artifact.metadata) == {"step": 3}
    assert [entry.path for entry in artifact.manifest.contents] == ["manifest.json"]
    out, err = capsys.readouterr()
    assert f"`wandb sync {config.output_dir}/wandb/offline-run-" in out
    assert "wandb:" not in out + err


def test_generated_answers_are_a_table(tmp_path: Path) -> None:
    tracker = WandbTracker(OFFLINE, "abcd1234", {}, tmp_path, notify=print)
    records = [{"row": 0, "generated": "nine", "eval/bleu": 100.0}, {"row": 1, "generated": "\u4f60", "eval/bleu": 0.0}]
    tracker.samples(records, 7)
    tracker.samples([], 8)
    tracker.finish(0)
    [recorded] = read_runs(tmp_path / "wandb")
    [row] = recorded.history
    assert (row["step"], row["eval/samples/_type"], row["eval/samples/nrows"]) == (7, "table-file", 2)
    [file] = (tmp_path / "wandb").glob("offline-run-*/files/media/table/eval/*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(records[0])
    assert table["data"] == [list(record.values()) for record in records]


def test_what_a_run_is_made_of_without_the_name_of_its_owner(tmp_path: Path) -> None:
    home = Path("~").expanduser()
    wandb = WandbConfig(project="p", mode="offline", job_type="train", notes="why")
    data = (SourceConfig(path=str(home / "rows.jsonl")), SourceConfig(path="/home/ann/a"), SourceConfig(path="b"))
    resolved = to_dict(Config(output_dir=tmp_path / "run", wandb=wandb, data=DataConfig(train=data)))
    tracker = WandbTracker(wandb, "abcd1234", resolved, tmp_path, notify=print)
    tracker.inputs({"train": [{"path": "/Users/ann/rows.jsonl"}], "report": {"num_rows": 3}})
    tracker.finish(0)

    [recorded] = read_runs(tmp_path / "wandb")
    assert (recorded.run.job_type, recorded.run.notes, recorded.run.run_group) == ("train", "why", "")
    paths = [source["path"] for source in recorded.config["data"]["train"]]
    assert paths == ["~/rows.jsonl", "~/a", "b"]
    assert "environment" not in recorded.num_records
    assert [artifact.use_after_commit for artifact in recorded.artifacts] == [True, True]
    described, config = recorded.artifacts
    assert (described.name, described.type) == ("data", "dataset")
    expected = {"train": [{"path": "~/rows.jsonl"}], "report": {"num_rows": 3}}
    assert json.loads(described.metadata) == json.loads(contents(described)["data.json"]) == expected
    assert (config.name, config.type) == ("abcd1234-config", "config")
    assert yaml.safe_load(contents(config)["config.yaml"]) == recorded.config


def test_the_finished_model_is_sent_if_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    for config in (OFFLINE, replace(OFFLINE, log_final=True)):
        tracker = WandbTracker(config, "abcd1234", {}, tmp_path, notify=print)
        tracker.final(checkpoint, 3, {"eval/loss": 0.5})
        tracker.finish(0)
    first, second = read_runs(tmp_path / "wandb")
    assert first.artifacts == []
    [artifact] = second.artifacts
    assert (artifact.name, artifact.type, artifact.use_after_commit) == ("abcd1234-final", "model", False)
    assert sorted(artifact.aliases) == ["final", "latest", "step-3"]
    assert json.loads(artifact.metadata) == {"step": 3, "eval/loss": 0.5}
    assert contents(artifact) == {"manifest.json": "{}"}


@pytest.mark.parametrize(("own", "group"), [({}, "abcd1234"), ({"name": "mine", "group": "g"}, "g")])
def test_a_worker_has_a_run_of_its_own_without_what_the_run_says(
    tmp_path: Path, checkpoint: Path, own: dict[str, Any], group: str
) -> None:
    config = replace(OFFLINE, system_metrics=True, log_final=True, log_checkpoints=True, notes="why", **own)
    for name in (None, "mac-1"):
        tracker = WandbTracker(config, "abcd1234", {}, tmp_path, notify=print, worker=name)
        tracker.inputs({})
        tracker.log({"train/loss": 1.0}, 1)
        tracker.samples([{"row": 0}], 1)
        tracker.checkpoint(checkpoint, 1, ["latest"])
        tracker.final(checkpoint, 1, {})
        tracker.rewind(0)
        tracker.finish(0)
    main, worker = sorted(read_runs(tmp_path / "wandb"), key=lambda read: len(read.run.run_id))
    assert (len(main.history), len(main.artifacts), main.run.run_group) == (2, 5, group)  # a table is one too
    assert (worker.history, worker.artifacts, worker.exit_code) == ([], [], 0)
    run = worker.run
    assert (run.run_id, run.job_type, run.run_group, run.notes) == ("abcd1234-mac-1", "worker", group, "")
    assert run.display_name == f"{own.get('name', 'abcd1234')} mac-1"


def test_a_resumed_run_goes_on_under_its_id_and_on_our_axis(tmp_path: Path, checkpoint: Path) -> None:
    track(OFFLINE, tmp_path, range(1, 4), checkpoint)
    track(OFFLINE, tmp_path, range(4, 6), checkpoint)
    first, second = read_runs(tmp_path / "wandb")
    assert (first.run.run_id, second.run.run_id) == ("abcd1234", "abcd1234")
    assert second.run.resume
    assert [row["step"] for row in first.history + second.history] == [1, 2, 3, 4, 5]
    axes = [(metric.glob_name, metric.step_metric) for metric in second.metrics if metric.step_metric]
    assert axes == [("*", "step")]


def test_checkpoints_are_sent_only_if_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    track(OFFLINE, tmp_path, range(1, 2), checkpoint)
    [recorded] = read_runs(tmp_path / "wandb")
    assert recorded.artifacts == []


def test_a_checkpoint_that_is_gone_costs_that_artifact_only(tmp_path: Path) -> None:
    config = WandbConfig(project="p", mode="offline", log_checkpoints=True)
    notices = track(config, tmp_path, range(1, 3), tmp_path / "gone")
    assert [line.split()[0] for line in notices] == ["W&B", "warning:"]
    assert f"{tmp_path / 'gone'} is not sent to W&B" in notices[1]
    [recorded] = read_runs(tmp_path / "wandb")
    assert (len(recorded.history), recorded.exit_code) == (2, 0)


def test_artifacts_that_cannot_be_sent_are_told_of_once(tmp_path: Path, checkpoint: Path) -> None:
    notices: list[str] = []
    config = replace(OFFLINE, log_checkpoints=True, log_final=True)
    tracker = WandbTracker(config, "abcd1234", {}, tmp_path, notify=notices.append)
    for step in (1, 2):
        tracker.checkpoint(tmp_path / "gone", step, ["latest"])
    tracker.final(checkpoint, 2, {})
    tracker.finish(0)
    assert [line.split()[0] for line in notices] == ["W&B", "warning:"]
    [recorded] = read_runs(tmp_path / "wandb")
    assert [*recorded.aliases] == ["abcd1234-final"]


def test_online_gives_way_to_the_environment(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(ONLINE, tmp_path, range(1, 3), checkpoint)
    assert len(read_runs(tmp_path / "wandb")) == 1
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(ONLINE, tmp_path, range(1, 3), checkpoint) == []
    assert len(read_runs(tmp_path / "wandb")) == 1


def test_without_a_key_there_is_one_warning(tmp_path: Path, checkpoint: Path) -> None:
    [warning] = track(ONLINE, tmp_path, range(1, 4), checkpoint)
    assert warning.startswith("warning: W&B is off; training goes on and metrics.jsonl has everything (UsageError: ")
    assert "wandb login" in warning


def test_a_server_out_of_reach_is_one_warning(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    [warning] = track(ONLINE, tmp_path, range(1, 4), checkpoint, timeout_s=2.0)
    assert warning.startswith("warning: W&B is off")


def test_a_server_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun_s = time.monotonic()
        notices = track(ONLINE, tmp_path, range(1, 4), checkpoint, timeout_s=0.5)
        assert time.monotonic() - begun_s < WAIT_S
    assert [line.split()[0] for line in notices] == ["warning:"]


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    [warning] = track(OFFLINE, tmp_path / "file", range(1, 4), checkpoint)
    assert "FileExistsError" in warning


def test_a_crash_of_the_service_is_one_warning(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from mlx_distributed.config import WandbConfig
from mlx_distributed.tracking import WandbTracker
config = WandbConfig(project="p", mode="offline")
tracker = WandbTracker(config, "abcd1234", {{}}, Path({str(tmp_path)!r}), notify=lambda text: print(text, flush=True))
tracker.log({{"train/loss": 1.0}}, 1)
sys.stdin.read()
tracker.log({{"train/loss": 1.0}}, 2)
tracker.finish(0)
print("the run is done")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline().startswith("W&B is offline")
        [service] = services(process.pid)
        os.kill(service, signal.SIGKILL)
        process.stdin.close()
        warning, done = process.stdout.read().splitlines()
        assert process.wait() == 0
    assert warning.startswith("warning: W&B is off")
    assert done == "the run is done"


def test_a_run_does_not_wait_for_w_and_b_without_end(tmp_path: Path) -> None:
    notices: list[str] = []
    release = threading.Event()

    def notify(text: str) -> None:
        notices.append(text)
        if threading.current_thread() is not threading.main_thread():
            release.wait(WAIT_S)

    tracker = WandbTracker(OFFLINE, "abcd1234", {}, tmp_path, notify=notify, timeout_s=0.5)
    tracker.finish(0)
    last = notices[-1]
    release.set()
    assert last == f"warning: W&B has not taken everything in time; `wandb sync` sends {tmp_path / 'wandb'}"
