"""Several trackers as one, and those that a configuration asks for."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_distributed.config import Config, WandbConfig
from mlx_distributed.errors import ConfigError, MlxDistributedError, TrainingError
from mlx_distributed.tracking import Tracker, Trackers, new_wandb_id, open_tracker


class Notes:
    """Writes down what it is told, in a list that trackers may share."""

    def __init__(self, name: str, calls: list[tuple[object, ...]], fault: Exception | None = None) -> None:
        self.name, self.calls, self.fault = name, calls, fault

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls.append((self.name, "log", dict(metrics), step))

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        self.calls.append((self.name, "samples", list(records), step))

    def rewind(self, step: int) -> None:
        self.calls.append((self.name, "rewind", step))

    def message(self, text: str) -> None:
        self.calls.append((self.name, "message", text))

    def inputs(self, data: Mapping[str, Any]) -> None:
        self.calls.append((self.name, "inputs", dict(data)))

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        self.calls.append((self.name, "checkpoint", folder, step, tuple(aliases)))

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((self.name, "final", folder, step, dict(metrics)))

    def finish(self, exit_status: int) -> None:
        self.calls.append((self.name, "finish", exit_status))
        if self.fault is not None:
            raise self.fault


def test_everything_goes_to_all_in_order() -> None:
    calls: list[tuple[object, ...]] = []
    both: Tracker = Trackers([Notes("a", calls), Notes("b", calls)])
    both.log({"train/loss": 1.0}, 1)
    both.samples([{"row": 0}], 1)
    both.rewind(0)
    both.message("hello")
    both.checkpoint(Path("c"), 1, ["latest"])
    both.finish(0)
    both.finish(1)
    assert calls == [
        ("a", "log", {"train/loss": 1.0}, 1),
        ("b", "log", {"train/loss": 1.0}, 1),
        ("a", "samples", [{"row": 0}], 1),
        ("b", "samples", [{"row": 0}], 1),
        ("a", "rewind", 0),
        ("b", "rewind", 0),
        ("a", "message", "hello"),
        ("b", "message", "hello"),
        ("a", "checkpoint", Path("c"), 1, ("latest",)),
        ("b", "checkpoint", Path("c"), 1, ("latest",)),
        ("b", "finish", 0),
        ("a", "finish", 0),
    ]


def test_all_are_finished_even_if_one_fails() -> None:
    calls: list[tuple[object, ...]] = []
    both = Trackers([Notes("a", calls), Notes("b", calls, fault=OSError("full"))])
    with pytest.raises(OSError, match="full"):
        both.finish(0)
    assert calls == [("b", "finish", 0), ("a", "finish", 0)]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (TrainingError("x"), 1), (ConfigError("x"), 2), (KeyboardInterrupt(), 130), (ValueError("x"), 1)],
)
def test_leaving_a_with_finishes_with_the_status_of_the_error(error: BaseException | None, status: int) -> None:
    calls: list[tuple[object, ...]] = []

    def run() -> None:
        with Trackers([Notes("a", calls)]):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises((MlxDistributedError, KeyboardInterrupt, ValueError)):
            run()
    assert calls == [("a", "finish", status)]


@pytest.mark.parametrize("wandb", [WandbConfig(), WandbConfig(project="p", mode="disabled")])
def test_without_a_project_there_are_the_file_and_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: WandbConfig
) -> None:
    config = Config(output_dir=tmp_path, wandb=wandb)
    with open_tracker(config, 4, new_wandb_id()) as tracker:
        tracker.log({"train/loss": 1.0}, 1)
        tracker.log({"train/loss": 0.5}, 2)
        assert "wandb-tracker" not in [thread.name for thread in threading.enumerate()]
    with open_tracker(config, 4, new_wandb_id(), resume_step=1) as tracker:
        tracker.log({"train/loss": 0.25}, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "train/loss": 1.0}', '{"step": 2, "train/loss": 0.25}']
    assert [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["step 1/4", "loss 1.000"],
        ["step 2/4", "loss 0.500"],
        ["step 2/4", "loss 0.250"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_ids_are_short_and_their_own() -> None:
    ids = {new_wandb_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[a-z0-9]{8}", text) for text in ids)
