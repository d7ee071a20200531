"""What is written into a journal before a run goes on from a checkpoint, and the coordinator in its thread."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from elastic_command import open_config, opened

from mlx_distributed.cli.elastic.access import prepare_access
from mlx_distributed.cli.elastic.serving import Serving, make_rules, resumed
from mlx_distributed.cli.output_dir import JOURNAL
from mlx_distributed.cli.output_dir import RunRecord as RunFolder
from mlx_distributed.elastic.journal import Journal
from mlx_distributed.elastic.protocol import (
    START,
    CommitRecord,
    Epoch,
    EpochId,
    EpochRecord,
    Outcome,
    Record,
    RunRecord,
    Seat,
    TermRecord,
    WorkerId,
)
from mlx_distributed.elastic.replay import started
from mlx_distributed.errors import ConfigError

EPOCH = Epoch(EpochId(1, 1), START, (Seat(WorkerId("a", "1"), "127.0.0.1:1", 1.0),), "a joined")
TWO_STEPS: tuple[Record, ...] = (
    RunRecord("run"),
    TermRecord(1),
    EpochRecord(EPOCH),
    *(CommitRecord(Outcome(step, f"d{step}"), (1.0,)) for step in (1, 2)),
)


@pytest.mark.parametrize("records", [(), TWO_STEPS[:1], TWO_STEPS[:3], TWO_STEPS], ids=len)
@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_a_run_goes_on_from_its_checkpoint_wherever_its_journal_ends(
    tmp_path: Path, records: tuple[Record, ...], step: int
) -> None:
    config = open_config(tmp_path)
    rules = make_rules(config, "run", 9, "digest")
    begins_with = Outcome(step, "checkpoint") if step else START
    before, _ = started(rules, records, 0.0)
    new = resumed(before, begins_with)
    head = (RunRecord("run"),) if new and not records else ()
    state, _ = started(rules, (*head, *records, *new), 0.0)
    assert state.committed == begins_with
    assert resumed(state, begins_with) == []
    if new:
        assert state.epoch is None
        assert state.members == {}


def test_the_rules_are_those_of_the_configuration(tmp_path: Path) -> None:
    config = open_config(tmp_path, "elastic.min_workers=3", "elastic.wait_s=7", "parallel.share=speed")
    rules = make_rules(config, "run", 9, "digest")
    assert (rules.min_workers, rules.wait_s, rules.share, rules.num_steps) == (3, 7.0, "speed", 9)
    assert make_rules(open_config(tmp_path), "run", 9, "digest").share == "even"


@contextmanager
def serve(folder: Path, *overrides: str, begins_with: Outcome = START) -> Iterator[Serving]:
    """A coordinator of the run "run"."""
    config = open_config(folder, *overrides)
    config.output_dir.mkdir(exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        record = RunFolder("run", "wandb", config.output_dir / "config.yaml", lock)
        rules = make_rules(config, "run", 9, "digest")
        access = prepare_access(config, "run")
        serving = Serving(config, record, access, rules, lambda line: None, lambda state: resumed(state, begins_with))
        try:
            yield serving
        finally:
            serving.stop()


def test_a_coordinator_that_starts_again_is_in_the_next_term(tmp_path: Path) -> None:
    for term in (1, 2):
        with serve(tmp_path) as serving:
            assert serving.end(0.0) is None
            assert serving.access.contact.status().epoch is None
        journal = Journal(tmp_path / "out" / JOURNAL)
        journal.close()
        assert [record.term for record in journal.records if isinstance(record, TermRecord)] == [1, 2][:term]


def test_the_journal_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    journal = Journal(tmp_path / "out" / JOURNAL)
    journal.append(RunRecord("another"))
    journal.close()
    before = journal.path.read_bytes()
    with pytest.raises(ConfigError, match="the journal belongs to the run another"), serve(tmp_path):
        pass
    assert journal.path.read_bytes() == before


def test_a_port_in_use_is_refused_and_the_journal_let_go(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for _ in range(2):  # the second time the journal is free again
            address = f"elastic.listen=127.0.0.1:{port}"
            with pytest.raises(ConfigError, match="is the port in use"), serve(tmp_path, address):
                pass


def test_a_run_without_a_journal_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    for _ in range(2):  # the second time the journal knows
        with serve(tmp_path, begins_with=Outcome(7, "checkpoint")) as serving:
            status = serving.access.contact.status()
            assert (status.num_committed, status.num_steps, status.members) == (7, 9, ())


def test_what_is_kept_is_for_its_owner_and_comes_back(tmp_path: Path) -> None:
    config = open_config(tmp_path, "elastic.listen=127.0.0.1:0")
    with opened(config) as record:
        pass
    first = prepare_access(config, record.run_id)
    secrets = [first.token, str(first.key)]
    assert not [secret for secret in secrets if secret in repr(first)]
    running = dataclasses.replace(first, address="127.0.0.1:4711")
    running.write(config.output_dir)
    assert (config.output_dir / "coordinator.json").stat().st_mode & 0o777 == 0o600
    assert prepare_access(config, record.run_id) == running, "workers wait for it at the same address"
    assert prepare_access(config, "another").token != first.token
    moved = open_config(tmp_path, "elastic.listen=127.0.0.1:5000")
    assert prepare_access(moved, record.run_id) == dataclasses.replace(first, address="127.0.0.1:5000")
    alone = prepare_access(open_config(tmp_path), record.run_id)
    assert (alone.identity, alone.invitation, alone.address) == (None, None, "127.0.0.1:0")


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": "a"}', '{"none": 1}'])
def test_damage_is_named(tmp_path: Path, text: str) -> None:
    config = open_config(tmp_path, "elastic.listen=127.0.0.1:0")
    config.output_dir.mkdir()
    (config.output_dir / "coordinator.json").write_text(text)
    with pytest.raises(ConfigError, match=r"coordinator\.json is damaged; remove it"):
        prepare_access(config, "run")
