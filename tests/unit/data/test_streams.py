"""Sources are read from any row on, and tell when they are not what they were."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.config import SourceConfig
from mlx_distributed.data.files import MAX_PIECE_BYTES, Place, read_rows
from mlx_distributed.data.messages import Invalid
from mlx_distributed.data.streams import HubStream, Mark, Stream, look_at, open_stream
from mlx_distributed.errors import DataError, StreamError

NUM_ROWS = 23


@pytest.fixture(scope="module", params=["lines", "parquet", "folder"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    folder = tmp_path_factory.mktemp(request.param)
    rows = [{"text": f"row {number} \u2028 {'x' * number}"} for number in range(NUM_ROWS)]
    if request.param == "lines":
        write_lines(folder / "rows.jsonl", rows)
    elif request.param == "parquet":
        write_table(folder / "rows.parquet", rows)
    else:
        write_lines(folder / "a.jsonl", rows[:7])
        write_table(folder / "b.parquet", rows[7:12])
        write_lines(folder / "c.jsonl", [])
        write_lines(folder / "d.jsonl", rows[12:])
        return SourceConfig(path=str(folder))
    return SourceConfig(path=str(next(folder.iterdir())))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """With a blank line after every row, and a byte order mark."""
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n \n" for row in rows)
    path.write_text(text, encoding="utf-8-sig")
    return path


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


@given(st.lists(st.integers(0, NUM_ROWS + 3), min_size=2, max_size=6), st.data())
def test_any_row_is_found_from_any_place_before_it(source: SourceConfig, cuts: list[int], data: st.DataObject) -> None:
    stream, expected = open_stream(source), read_rows(source)
    marks = [Mark()]
    for cut in sorted(cuts):
        mark = data.draw(st.sampled_from(marks))
        rows, after = stream.read(mark, max(cut, mark.row), 4)
        assert rows == expected[max(cut, mark.row) :][:4]
        assert after.row == min(max(cut, mark.row) + 4, NUM_ROWS)
        marks.append(after)


def test_bad_lines_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n\xff\n3')
    rows, mark = open_stream(SourceConfig(path=str(path))).read(Mark(), 0, 9)
    assert [place for place, _ in rows] == [Place(str(path), line) for line in (1, 2, 3, 4)]
    assert [isinstance(row, Invalid) for _, row in rows] == [False, True, True, False]
    assert mark.row == 4


def test_a_line_without_an_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\x00\xff')  # The rest of it is no text.
    os.truncate(path, MAX_PIECE_BYTES * 4)
    stream = open_stream(SourceConfig(path=str(path)))
    rows, mark = stream.read(Mark(), 0, 1)
    assert (len(rows), mark.row) == (1, 1)
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is longer than 64 MiB, .* if this is none of JSON lines"):
        stream.read(mark, 1, 1)


def test_rows_of_a_table_that_are_large_in_memory_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "b.parquet"
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 3)
    texts = pa.array([*["a"] * 16, *["a" * 5_000_000] * 16])
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    stream = open_stream(SourceConfig(path=str(tmp_path)))
    rows, mark = stream.read(Mark(), 0, 19)
    assert len(rows) == 19
    with pytest.raises(DataError, match=r"b\.parquet: rows 17 to 32 take 76 MiB in memory"):
        stream.read(mark, 19, 1)


@pytest.mark.parametrize("change", [lambda text: text + text, lambda text: text.replace("a", "b"), lambda text: ""])
def test_a_file_that_changes_is_named(tmp_path: Path, change: Any) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a"}] * 9)
    stream = open_stream(SourceConfig(path=str(path)))
    _, mark = stream.read(Mark(), 0, 4)
    path.write_text(change(path.read_text()))
    os.utime(path, (1, 1))
    with pytest.raises(
        StreamError, match=r"rows.jsonl has changed since the run began: it had 147 bytes with the hash"
    ):
        stream.read(mark, 4, 4)


def test_the_same_contents_are_the_same_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "a"}] * 9)
    stream = open_stream(SourceConfig(path=str(path)))
    os.utime(path, (1, 1))
    assert len(stream.read(Mark(), 0, 9)[0]) == 9
    copy = write_lines(tmp_path / "copy.jsonl", [{"text": "a"}] * 9)
    assert open_stream(SourceConfig(path=str(copy))).identity == stream.identity


def test_a_large_file_is_sampled_all_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"." * (4 << 20))
    before = look_at(path)
    for at in range(0, 4 << 20, 1 << 17):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"!" * (1 << 17))
        assert look_at(path).digest != before.digest
        path.write_bytes(b"." * (4 << 20))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.json", "[]", r"cannot be streamed, since data.streaming reads .jsonl and .parquet files, in parts"),
        ("rows.jsonl", '\ufeff [{"text": "a"}]', "holds one JSON array, which cannot be read in parts"),
        ("rows.txt", "a", "cannot be streamed"),
    ],
)
def test_what_cannot_be_read_in_parts_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        open_stream(SourceConfig(path=str(tmp_path / name)))


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        open_stream(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    with pytest.raises(DataError, match=r"holds no \.json"):
        open_stream(SourceConfig(path=str(tmp_path)))


def test_a_broken_table(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no more")
    stream = open_stream(SourceConfig(path=str(tmp_path / "rows.parquet")))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        stream.read(Mark(), 0, 1)


def test_a_dataset_of_the_hub_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="someone/rows is no file or folder here, and as a Hugging Face dataset"):
        open_stream(SourceConfig(path="someone/rows"))


class Local(HubStream):
    """A dataset as the hub gives it, but from a file."""

    def open(self) -> Any:
        import datasets

        return datasets.load_dataset("json", data_files=self.source.path, split="train", streaming=True)


def test_a_dataset_goes_on_from_its_own_record(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(NUM_ROWS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    stream = Local(SourceConfig(path=str(path)), "abc", NUM_ROWS)
    first, mark = stream.read(Mark(), 2, 5)
    mark = Mark(**json.loads(json.dumps(vars(mark))))
    second, end = stream.read(mark, 9, 50)
    assert [row for _, row in first] == rows[2:7]
    assert [row for _, row in second] == rows[9:]
    assert [place.line for place, _ in second] == [*range(10, NUM_ROWS + 1)]
    assert (mark.row, end.row) == (7, NUM_ROWS)
    other: Stream = replace(stream, revision="abd")
    assert stream.identity != other.identity


def test_a_dataset_that_ends_early_is_not_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(OSError, match="ended after 2 of 5 rows"):
        Local(SourceConfig(path=str(path)), "abc", 5).read(Mark(), 0, 9)
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(OSError, match="broke off"):
        Local(SourceConfig(path=str(path)), "abc", 5).read(Mark(), 0, 9)
