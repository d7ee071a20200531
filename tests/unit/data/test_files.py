from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.config.schema import SourceConfig
from mlx_distributed.data.files import MAX_PIECE_BYTES, read_rows
from mlx_distributed.data.messages import Invalid
from mlx_distributed.errors import DataError

ROWS = [{"text": "a"}, {"text": "b\u2028\nc"}, 3]


def write(path: Path, text: str, encoding: str = "utf-8") -> SourceConfig:
    path.write_bytes(text.encode(encoding))
    return SourceConfig(path=str(path))


def peak_bytes() -> int:
    """Of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage << 10


def lines_and_rows(source: SourceConfig) -> list[tuple[int, object]]:
    read = read_rows(source)
    assert {place.file for place, _ in read} <= {source.path}
    return [(place.line, row) for place, row in read]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.lists(st.integers(), max_size=3)), min_size=1
    ),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
def test_an_array_is_read_with_the_line_of_each_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], indent: int | None, bom: bool
) -> None:
    source = write(
        tmp_path_factory.mktemp("x") / "a.json", json.dumps(rows, indent=indent), "utf-8-sig" if bom else "utf-8"
    )
    read = lines_and_rows(source)
    assert [row for _, row in read] == rows
    if indent is None:
        assert {line for line, _ in read} == {1}
    else:
        lines = Path(source.path).read_text(encoding="utf-8-sig").splitlines()
        assert all(lines[line - 1].strip().startswith("{") for line, _ in read)
        assert sorted({line for line, _ in read}) == [line for line, _ in read]


def test_rows_may_stand_under_one_key_of_an_object(tmp_path: Path) -> None:
    text = '{"version": [1],\n "data": [\n{"text": "a"},\n{"text": "b"}\n], "note": {}}\n'
    assert lines_and_rows(write(tmp_path / "a.json", text)) == [(3, {"text": "a"}), (4, {"text": "b"})]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user"}]},
        {"prompt": "a", "completion": "b", "tools": [{}]},
        {"a": [{}], "b": [{}]},
        {"a": []},
        "text",
    ],
)
def test_an_object_that_is_a_row_or_holds_no_one_list_is_a_row(tmp_path: Path, row: object) -> None:
    assert lines_and_rows(write(tmp_path / "a.json", "\n" + json.dumps(row))) == [(2, row)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_lines_are_read_in_either_kind_of_file(tmp_path: Path, suffix: str) -> None:
    text = "\r\n".join(["", *(json.dumps(row, ensure_ascii=False) for row in ROWS), ""])
    assert lines_and_rows(write(tmp_path / f"a{suffix}", text)) == list(zip((2, 3, 4), ROWS, strict=True))


def test_an_array_in_a_jsonl_file_is_an_array(tmp_path: Path) -> None:
    assert lines_and_rows(write(tmp_path / "a.jsonl", "[1,\n2]")) == [(1, 1), (2, 2)]


def test_a_line_that_is_not_json_is_an_invalid_row(tmp_path: Path) -> None:
    text = '{"text": "a"}\n{"text": \n' + "[" * 100_000 + '\n{"text": "b"}\n'
    (_, first), (at, broken), (_, deep), (last, _) = lines_and_rows(write(tmp_path / "a.jsonl", text))
    assert (first, at, last) == ({"text": "a"}, 2, 4)
    for row in (broken, deep):
        assert isinstance(row, Invalid)
        assert row.reason == "line is not valid JSON"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"a": 1},\n{"a": }]', ":2"),
        ('[{"a": 1}\n{"a": 2}]', ":2"),
        ('[{"a": 1},\n', ":2"),
        ("[1]\n]", ":2"),
        ('{\n"a": }', ":2"),
        ("[" * 100_000, ""),
    ],
)
def test_a_broken_document_is_refused_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(DataError, match=rf"a\.json{where} .*JSON"):
        read_rows(write(tmp_path / "a.json", text))


def test_a_line_without_an_end_is_refused_and_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "')
    os.truncate(path, MAX_PIECE_BYTES * 16)
    before = peak_bytes()
    with pytest.raises(DataError, match=r"a\.jsonl:2 is longer than 64 MiB, .*; write one row per line"):
        read_rows(SourceConfig(path=str(path)))
    assert peak_bytes() - before < 4 * MAX_PIECE_BYTES


def test_what_is_larger_than_the_memory_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with pytest.raises(
        DataError, match=r"a\.json holds .* GB or more and is read whole, .* set data\.streaming to true"
    ):
        read_rows(SourceConfig(path=str(path)))


def test_an_empty_array_holds_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json holds no rows"):
        read_rows(write(tmp_path / "a.json", "[ ]"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl? holds no rows"):
        read_rows(write(tmp_path / name, text))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json cannot be read as UTF-8"):
        read_rows(write(tmp_path / "a.json", '[{"a": "\u00e9"}]', "latin-1"))


@pytest.mark.parametrize("path", ["none.json", "a/b/c", "/nowhere/else", "./folder"])
def test_a_missing_file_is_refused(path: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(SourceConfig(path=path))


def test_what_the_system_refuses_to_read_is_refused() -> None:
    with pytest.raises(DataError, match=r"too long|no such file"):  # the second from Python 3.13 on
        read_rows(SourceConfig(path="x" * 10_000 + ".json"))


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known kind"):
        read_rows(write(tmp_path / "a.csv", "a,b"))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "q"}]}, {"messages": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert lines_and_rows(SourceConfig(path=str(path))) == [(1, rows[0]), (2, rows[1])]
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        read_rows(SourceConfig(path=str(path)))


def test_a_small_table_that_is_large_in_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", *["a" * 5_000_000] * 18])}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"a\.parquet: rows 1 to 16 take 71 MiB in memory, and 16 rows may take 64 MiB"):
        read_rows(SourceConfig(path=str(path)))


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.json", "[3]")
    write(tmp_path / "a.jsonl", "1\n2\n")
    write(tmp_path / "readme.md", "no")
    read = read_rows(SourceConfig(path=str(tmp_path)))
    assert [(Path(place.file).name, place.line, row) for place, row in read] == [
        ("a.jsonl", 1, 1),
        ("a.jsonl", 2, 2),
        ("b.json", 1, 3),
    ]
    assert str(read[0][0]) == f"{tmp_path / 'a.jsonl'}:1"


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.json"):
        read_rows(SourceConfig(path=str(tmp_path)))


def test_held_out_files_are_not_trained_on_by_accident(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "1")
    write(tmp_path / "valid.jsonl", "2")
    with pytest.raises(DataError, match=r"train file beside valid\.jsonl"):
        read_rows(SourceConfig(path=str(tmp_path)))


def test_a_saved_dataset_with_and_without_splits(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": "a"}, {"text": "b"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[:1])}).save_to_disk(str(tmp_path / "many"))
    assert lines_and_rows(SourceConfig(path=str(tmp_path / "one"))) == list(enumerate(rows, 1))
    assert lines_and_rows(SourceConfig(path=str(tmp_path / "many"))) == [(1, rows[0])]
    with pytest.raises(DataError, match="no split 'test'; set split to one of train"):
        read_rows(SourceConfig(path=str(tmp_path / "many"), split="test"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a saved"):
        read_rows(SourceConfig(path=str(tmp_path / "one")))


def test_a_name_that_is_no_path_is_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="someone/rows is no file or folder here, and as a Hugging Face dataset"):
        read_rows(SourceConfig(path="someone/rows"))
