from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.elastic.journal import Journal, encode, parse
from mlx_distributed.elastic.protocol import (
    START,
    CommitRecord,
    Epoch,
    EpochId,
    EpochRecord,
    Outcome,
    Record,
    RollbackRecord,
    RunRecord,
    Seat,
    TermRecord,
    WorkerId,
)
from mlx_distributed.errors import ConfigError

SEATS = (Seat(WorkerId("Mac of Jörg", "1"), "10.0.0.7:4000", 1.33), Seat(WorkerId("b", "2"), "b.local:1", 0.667, 1.2e8))
RECORDS: list[Record] = [
    RunRecord("run"),
    TermRecord(1),
    EpochRecord(Epoch(EpochId(1, 1), START, SEATS, "b joined")),
    CommitRecord(Outcome(1, "d"), (1.33, 0.667)),
    RollbackRecord(Outcome(0, "checkpoint")),
]
DATA = b"".join(map(encode, RECORDS))


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for part in (RECORDS[:2], RECORDS[2:]):
        journal = Journal(path)
        for record in part:
            journal.append(record)
        journal.close()
    journal = Journal(path)
    journal.close()
    assert journal.records == RECORDS
    assert path.read_bytes() == DATA


@given(st.integers(0, len(DATA) - 1))
def test_a_torn_end_is_cut_off(num_bytes: int) -> None:
    records, num_whole = parse(DATA[:num_bytes], "journal")
    assert records == RECORDS[: len(records)]
    assert DATA[:num_whole] == b"".join(map(encode, records))
    assert b"\n" not in DATA[num_whole:num_bytes]


def test_appending_goes_on_after_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = b"".join(map(encode, RECORDS[:3]))
    for torn in (b"1234 {", b"\0\0\0\0\0\0}\n"):
        path.write_bytes(whole + torn)
        journal = Journal(path)
        assert journal.records == RECORDS[:3]
        journal.append(RECORDS[3])
        journal.close()
        assert path.read_bytes() == whole + encode(RECORDS[3])


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_any_other_damage_is_refused_by_name(place: int, flip: int) -> None:
    damaged = bytearray(DATA)
    damaged[place] ^= flip
    if place == len(DATA) - 1 or (damaged[place] == 0 and place > DATA[:-1].rindex(b"\n")):
        return  # That is how a torn end looks.
    with pytest.raises(ConfigError, match="the journal J is damaged in line"):
        parse(bytes(damaged), "J")


def test_a_record_of_an_unknown_kind_is_damage() -> None:
    line = b'{"kind":"wish"}'
    with pytest.raises(ConfigError, match="damaged in line 1"):
        parse(b"%08x %s\n" % (zlib.crc32(line), line), "J")


def test_a_run_has_one_coordinator(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(ConfigError, match=r"another coordinator is at work with the journal .*: a run has one"):
        Journal(tmp_path / "journal")
    journal.close()
    Journal(tmp_path / "journal").close()


def test_a_journal_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened: No such file"):
        Journal(tmp_path / "nowhere" / "journal")


def test_a_record_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(path.stat().st_size), fsync(descriptor))[1])
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append(RECORDS[0])
    journal.close()
    assert synced == [0, len(encode(RECORDS[0]))], "the folder, then the record"
