from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_distributed.cli.output_dir import RunRecord, accept_config, open_output_dir
from mlx_distributed.config import Config, DataConfig, ModelConfig, SourceConfig, load_config
from mlx_distributed.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "rows.jsonl").touch()
    data = DataConfig(train=(SourceConfig(path=str(tmp_path / "rows.jsonl")),))
    return Config(ModelConfig(path=str(tmp_path)), data=data, output_dir=tmp_path / "runs" / "mine")


def open_and_leave(config: Config, resume: bool) -> RunRecord:
    """A run that is refused by its workers."""
    record = open_output_dir(config, resume)
    record.lock.close()
    return record


def start(config: Config) -> RunRecord:
    """A run that rank 0 has found nothing wrong with, and that has ended."""
    record = open_and_leave(config, resume=False)
    accept_config(config)
    return record


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_run_is_recorded(config: Config, resume: bool, exists: bool) -> None:
    if exists:
        config.output_dir.mkdir(parents=True)
    record = open_and_leave(config, resume)
    assert load_config(record.config_file) == config
    assert record.config_file.parent == config.output_dir
    assert {name for name in contents(config.output_dir) if not name.startswith(".")} == {"run.json"}
    accept_config(config)
    assert load_config(config.output_dir / "config.yaml") == config
    written = json.loads((config.output_dir / "run.json").read_text())
    assert (written["run_id"], written["wandb_id"]) == (record.run_id, record.wandb_id)
    assert {"mlx", "mlx-lm", "python", "mlx-distributed"} <= set(written["versions"])


def test_runs_are_told_apart(config: Config) -> None:
    records = [open_and_leave(replace(config, output_dir=config.output_dir / name), False) for name in "ab"]
    assert len({record.run_id for record in records}) == len({record.wandb_id for record in records}) == 2


def test_a_resumed_run_stays_who_it_is_and_takes_the_new_configuration(config: Config) -> None:
    first = start(config)
    changed = replace(config, train=replace(config.train, epochs=7.0))
    second = open_and_leave(changed, resume=True)
    assert (second.run_id, second.wandb_id) == (first.run_id, first.wandb_id)
    assert load_config(second.config_file) == changed
    assert load_config(config.output_dir / "config.yaml") == config  # until rank 0 finds nothing wrong with it
    accept_config(changed)
    assert load_config(config.output_dir / "config.yaml") == changed


@pytest.mark.parametrize("resume", [False, True])
def test_one_run_at_a_time_writes(config: Config, resume: bool) -> None:
    record = open_output_dir(config, resume=False)
    with record.lock, pytest.raises(ConfigError, match="a run is writing into it right now; end that one"):
        open_output_dir(config, resume)
    accept_config(config)
    assert open_and_leave(config, resume=True).run_id == record.run_id


def test_what_was_refused_does_not_stand_in_the_way(config: Config) -> None:
    first = open_and_leave(config, resume=False)
    (config.output_dir / "logs").mkdir()
    assert open_and_leave(replace(config, seed=5), resume=False).run_id != first.run_id
    accept_config(config)
    assert load_config(config.output_dir / "config.yaml").seed == 5


def test_the_run_of_somebody_else_is_left_alone(config: Config) -> None:
    start(config)
    before = contents(config.output_dir)
    with pytest.raises(ConfigError, match=f"^output_dir={config.output_dir} holds a run already; add --resume"):
        open_output_dir(replace(config, seed=5), resume=False)
    assert contents(config.output_dir) == before


@pytest.mark.parametrize("resume", [False, True])
def test_other_files_are_left_alone(config: Config, resume: bool) -> None:
    config.output_dir.mkdir(parents=True)
    (config.output_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run of this program"):
        open_output_dir(config, resume)
    assert contents(config.output_dir) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"run_id": "a"}'])
def test_a_damaged_record_is_named(config: Config, text: str) -> None:
    start(config)
    (config.output_dir / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json is damaged; choose another --output-dir$"):
        open_output_dir(config, resume=True)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_cannot_be_a_folder(config: Config, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^output_dir=.*file.* cannot be used: Not a directory$"):
        open_output_dir(replace(config, output_dir=tmp_path / "file" / below), resume=False)
    assert (tmp_path / "file").read_text() == "mine"
