"""What is written is read again, row by row; what is not whole is not used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_distributed.data.chunks import VERSION, Chunk, Damaged, Record, write_chunk
from mlx_distributed.data.streams import Mark
from mlx_distributed.data.tokenize import Row

RECORD = Record(Mark(3, 1, 20, 2, {"shard": [1]}), ended=False)
ROWS = [Row(np.arange(9, dtype=np.int32), np.arange(9) > 4, (5, 8)), None, Row(np.ones(3, np.int32), np.ones(3, bool))]


@st.composite
def rows(draw: st.DrawFn) -> Row | None:
    mask = draw(st.lists(st.booleans(), max_size=20))
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(mask), max_size=len(mask)))
    reference = (draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    return Row(np.array(tokens, np.int32), np.array(mask, bool), reference) if mask else None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(rows(), max_size=8))
def test_rows_come_back(tmp_path: Path, written: list[Row | None]) -> None:
    write_chunk(tmp_path / "a.rows", written, RECORD)
    chunk = Chunk(tmp_path / "a.rows")
    assert chunk.record == RECORD
    assert chunk.lengths.tolist() == [0 if row is None else len(row.tokens) for row in written]
    for number, row in enumerate(written):
        if row is not None:
            read = chunk.read(number)
            assert (read.tokens.dtype, read.loss_mask.dtype) == (np.int32, np.bool_)
            assert (read.tokens.tolist(), read.loss_mask.tolist()) == (row.tokens.tolist(), row.loss_mask.tolist())
            assert read.reference == row.reference
    assert [path.name for path in tmp_path.iterdir()] == ["a.rows"]


def test_no_torn_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.rows"
    write_chunk(path, ROWS, RECORD)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(Damaged, match=r"is no file of rows|is damaged"):
            Chunk(path)


def test_no_flipped_bit_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.rows"
    write_chunk(path, ROWS, RECORD)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(Damaged):
            Chunk(path)


def test_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.rows"
    write_chunk(path, ROWS, RECORD)
    path.write_bytes(path.read_bytes().replace(b"rows %d " % VERSION, b"rows %d " % (VERSION + 1), 1))
    with pytest.raises(Damaged, match=rf"another version of this program \(format {VERSION + 1}, not {VERSION}\)"):
        Chunk(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no JSON\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b'{"after": {}, "ended": false, "num_rows": -1}\n' + b"\xff" * 12,
        b'{"after": {}, "ended": false, "num_rows": 1000000000000}\n',
        b'{"after": {"place": 0}, "ended": false, "num_rows": 0}\n',
        b'{"after": {}, "num_rows": 0}\n',
        b'{"after": {}, "ended": false, "num_rows": 1}\n' + b"\xff" * 12,
        b'{"after": {}, "ended": false, "num_rows": 1}\n' + b"\x01" * 12,
    ],
)
def test_what_others_have_written_is_refused_though_its_hash_is_right(tmp_path: Path, text: bytes) -> None:
    digest = hashlib.sha256(text).hexdigest().encode()
    (tmp_path / "a.rows").write_bytes(b"mlx-distributed rows %d %s\n%s" % (VERSION, digest, text))
    with pytest.raises(Damaged, match="was not written by this program"):
        Chunk(tmp_path / "a.rows")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.rows").mkdir()
    with pytest.raises(OSError):
        write_chunk(tmp_path / "a.rows", ROWS, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["a.rows"]
