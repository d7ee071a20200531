"""Rows and where they stand, read from JSON, JSON Lines, Parquet, folders of these and Hugging Face datasets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distributed.config.schema import SourceConfig
from mlx_distributed.data.formats import fits
from mlx_distributed.data.messages import Invalid
from mlx_distributed.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
HELD_OUT = {"valid", "validation", "val", "dev", "eval", "test"}
MAX_PIECE_BYTES = 64 << 20
"""Of a line of JSON lines, and of `BATCH_ROWS` rows of Parquet as they are in memory, where next to nothing on disk may
become anything."""
BATCH_ROWS = 16
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_HEAD_CHARS = 1 << 14
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Place:
    file: str
    line: int
    """Line where the row begins, from 1; the number of the row in Parquet files and Hugging Face datasets."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(source: SourceConfig) -> list[tuple[Place, object]]:
    """Every row of a source, in order; an `Invalid` stands for a line that is not JSON.

    Raises:
        DataError: missing, unreadable or empty.
    """
    try:
        rows = _read(Path(source.path), source)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{source.path} holds no rows; give a file with at least one")
    return rows


def _read(path: Path, source: SourceConfig) -> list[tuple[Place, object]]:
    if path.is_dir():
        return _read_folder(path, source)
    if path.exists():
        return _read_file(path, source)
    if path.suffix not in SUFFIXES and HUB_NAME.fullmatch(source.path):
        return _read_hub(source)
    raise DataError(f"{path}: there is no such file; give a file, a folder or the name of a Hugging Face dataset")


def _read_folder(folder: Path, source: SourceConfig) -> list[tuple[Place, object]]:
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _read_saved(folder, source)
    return [row for path in list_folder(folder) for row in _read_file(path, source)]


def list_folder(folder: Path) -> list[Path]:
    """The files of a folder that is read whole, in the order of their rows.

    Raises:
        DataError: there are none, or some are for validation.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no {', '.join(SUFFIXES)} file; give a folder with at least one")
    held_out = [path.name for path in files if path.stem in HELD_OUT]
    if held_out and any(path.stem == "train" for path in files):
        raise DataError(
            f"{folder} holds a train file beside {', '.join(held_out)}, and a folder is read whole; "
            "name the files one by one under data.train and data.validation"
        )
    return files


def _read_file(path: Path, source: SourceConfig) -> list[tuple[Place, object]]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is of no known kind; give a {', '.join(SUFFIXES)} file")
    _check_memory(path, path.stat().st_size)
    try:
        return [(Place(str(path), line), row) for line, row in _read_text(path, source)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_text(path: Path, source: SourceConfig) -> Iterator[tuple[int, object]]:
    """The rows of a JSON document or of JSON lines, each with its line."""
    with path.open(encoding="utf-8-sig") as file:
        is_array = file.read(_HEAD_CHARS).lstrip().startswith("[")
    if path.suffix == ".json" or is_array:
        yield from _parse(path.read_text(encoding="utf-8-sig"), path, source)
    else:
        yield from _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Those of JSON lines."""
    # Not `splitlines`: it also splits at characters that may stand inside a JSON string, such as U+2028.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_PIECE_BYTES + 1), ""), 1):
            if len(line) > MAX_PIECE_BYTES:
                raise too_long(path, number)
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, Invalid("line is not valid JSON", str(error))


def _parse(text: str, path: Path, source: SourceConfig) -> Iterator[tuple[int, object]]:
    """The rows of a JSON array, of an object that holds one list of rows, or of JSON lines, each with its line."""
    start = _skip(text, 0)
    try:
        if text.startswith("[", start):
            yield from _parse_array(text, start, final=True)
            return
        if path.suffix == ".json" and start < len(text):
            row, end = _DECODER.raw_decode(text, start)
            if _skip(text, end) == len(text):
                at = None if fits(row, source) else _find_list(text, start, row)
                yield from [(_line(text, start), row)] if at is None else _parse_array(text, at)
                return
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not valid JSON ({error.msg}); mend the file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be parsed as JSON ({error})") from error
    yield from _read_lines(path)


def _parse_array(text: str, start: int, *, final: bool = False) -> Iterator[tuple[int, object]]:
    """The elements of the array that begins at `start`; with `final`, nothing may follow it."""
    line, counted = 1, 0
    at = _skip(text, start + 1)
    closed = text.startswith("]", at)
    while not closed:
        line += text.count("\n", counted, at)
        counted = at
        row, at = _DECODER.raw_decode(text, at)
        yield line, row
        at = _skip(text, at)
        closed = text.startswith("]", at)
        if not closed:
            if not text.startswith(",", at):
                raise json.JSONDecodeError("expected a comma or ]", text, at)
            at = _skip(text, at + 1)
    end = _skip(text, at + 1)
    if final and end != len(text):
        raise json.JSONDecodeError("something follows the array", text, end)


def _find_list(text: str, start: int, value: Any) -> int | None:
    """Where the list of rows begins in the object at `start`, if exactly one of its values is one."""
    if not isinstance(value, dict):
        return None
    names = [name for name, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(names) != 1:
        return None
    found = None
    at = _skip(text, start + 1)
    while not text.startswith("}", at):
        name, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # over the colon
        if name == names[0]:
            found = at
        _, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        at = _skip(text, at + 1) if text.startswith(",", at) else at
    return found


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # it also matches nothing
    return match.end()


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def too_long(path: Path, line: int) -> DataError:
    """Of a line with more than `MAX_PIECE_BYTES`."""
    return DataError(
        f"{path}:{line} is longer than {MAX_PIECE_BYTES >> 20} MiB, the most that a line may have, as each line is a "
        "row; write one row per line and cut long texts, or name another file if this is none of JSON lines"
    )


def check_batch(batch: Any, path: Path, first: int) -> None:
    """Raise DataError where a few rows of Parquet, from number `first` on, are too large in memory."""
    if batch.nbytes > MAX_PIECE_BYTES:
        raise DataError(
            f"{path}: rows {first} to {first + len(batch) - 1} take {batch.nbytes >> 20} MiB in memory, and "
            f"{BATCH_ROWS} rows may take {MAX_PIECE_BYTES >> 20} MiB; cut long texts, or remove columns that are not "
            "needed"
        )


def _check_memory(path: Path, num_bytes: int) -> None:
    """Raise DataError where what is read whole is larger than the memory of this machine."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory_bytes:
        raise DataError(
            f"{path} holds {num_bytes / 1e9:.1f} GB or more and is read whole, and this machine has "
            f"{memory_bytes / 1e9:.1f} GB of memory; set data.streaming to true, which reads .jsonl and .parquet files "
            "in parts"
        )


def _read_parquet(path: Path) -> list[tuple[Place, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[object] = []
    num_bytes = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(BATCH_ROWS):
                check_batch(batch, path, len(rows) + 1)
                num_bytes += batch.nbytes
                _check_memory(path, num_bytes)
                rows += batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return [(Place(str(path), number), row) for number, row in enumerate(rows, 1)]


def _read_saved(folder: Path, source: SourceConfig) -> list[tuple[Place, object]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a saved Hugging Face dataset: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise DataError(f"{folder} has no split {source.split!r}; set split to one of {', '.join(dataset)}")
        dataset = dataset[source.split]
    return [(Place(source.path, number), row) for number, row in enumerate(dataset, 1)]


def _read_hub(source: SourceConfig) -> list[tuple[Place, object]]:
    import datasets

    try:
        dataset = datasets.load_dataset(source.path, name=source.subset, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source.path} is no file or folder here, and as a Hugging Face dataset (split {source.split!r}, "
            f"subset {source.subset!r}) it cannot be loaded: {error}"
        ) from error
    return [(Place(source.path, number), row) for number, row in enumerate(dataset, 1)]
