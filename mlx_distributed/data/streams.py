"""Sources as streams: read from any row on, with no pass over all of them first.

Rows are numbered from 0 within their source, valid or not, so that a position is one number. A `Mark` says where such a
row stands in the files, and is all that is needed to go on from there.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from mlx_distributed.config.schema import SourceConfig
from mlx_distributed.data.files import (
    BATCH_ROWS,
    HUB_NAME,
    MAX_PIECE_BYTES,
    Place,
    check_batch,
    list_folder,
    too_long,
)
from mlx_distributed.data.messages import Invalid
from mlx_distributed.errors import DataError, StreamError

SUFFIXES = (".jsonl", ".parquet")
HEAD_ROWS = 2048
"""Of each source, read and checked before anything starts."""

_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14

RawRow = tuple[Place, object]


@dataclass(frozen=True)
class Mark:
    """Where a row stands."""

    row: int = 0
    """Its number in the source."""
    file: int = 0
    """Number of its file."""
    offset: int = 0
    """In the file: bytes of JSON lines, rows of Parquet."""
    line: int = 0
    """Lines before it in the file."""
    state: Mapping[str, Any] | None = None
    """Of a Hugging Face dataset, its own record of where it stands."""


class Stream(Protocol):
    """A source."""

    @property
    def identity(self) -> str:
        """Equal where two machines have the same data."""

    def read(self, mark: Mark, start: int, count: int) -> tuple[list[RawRow], Mark]:
        """The rows [start, start + count), fewer only where the source ends, and where the next one stands.

        Args:
            mark: of a row at or before `start`.
            start: number of the first row; behind the end there are none, and the mark is that of the end.
            count: of rows.

        Raises:
            OSError: it cannot be read just now.
            StreamError: it has changed since it was opened.
            DataError: it cannot be read at all.
        """


def open_stream(source: SourceConfig) -> Stream:
    """A source as a stream.

    Raises:
        DataError: there is no such source, or it cannot be read in parts.
    """
    path = Path(source.path)
    try:
        if path.is_dir():
            return FileStream(tuple(map(look_at, list_folder(path))))
        if path.exists():
            return FileStream((look_at(path),))
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error}") from error
    if path.suffix not in (*SUFFIXES, ".json") and HUB_NAME.fullmatch(source.path):
        return _open_hub(source)
    raise DataError(f"{path}: there is no such file; give a file, a folder or the name of a Hugging Face dataset")


@dataclass(frozen=True)
class File:
    """A file as it was when it was opened."""

    path: Path
    num_bytes: int
    digest: str
    """SHA-256 of its size and of samples from all over it."""
    modified_ns: int = field(compare=False)

    def check(self) -> None:
        """Raise StreamError where the file holds something else by now."""
        stat = self.path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (self.num_bytes, self.modified_ns):
            return
        now = look_at(self.path)
        if now != self:
            raise StreamError(
                f"{self.path} has changed since the run began: it had {self.num_bytes} bytes with the hash "
                f"{self.digest[:12]}, and has {now.num_bytes} with {now.digest[:12]}; put the old file back and go on "
                "with --resume, or start anew in another output_dir"
            )


def look_at(path: Path) -> File:
    """What a file is now. Samples are read, so that it takes the same time for any size.

    Raises:
        DataError: it is of a kind that is not read in parts.
        OSError: it cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path} cannot be streamed, since data.streaming reads {' and '.join(SUFFIXES)} files, in parts; convert "
            "it, or set data.streaming to false, which reads it whole"
        )
    with path.open("rb") as file:
        if path.suffix == ".jsonl" and file.read(_SAMPLE_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            raise DataError(
                f"{path} holds one JSON array, which cannot be read in parts; write one row per line, or set "
                "data.streaming to false"
            )
        stat = path.stat()
        digest = hashlib.sha256(str(stat.st_size).encode())
        for number in range(_NUM_SAMPLES):
            file.seek(max(stat.st_size - _SAMPLE_BYTES, 0) * number // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return File(path, stat.st_size, digest.hexdigest(), stat.st_mtime_ns)


@dataclass(frozen=True)
class FileStream:
    """The rows of files, one file after the other."""

    files: tuple[File, ...]

    @property
    def identity(self) -> str:
        return hashlib.sha256("".join(file.digest for file in self.files).encode()).hexdigest()

    def read(self, mark: Mark, start: int, count: int) -> tuple[list[RawRow], Mark]:
        rows: list[RawRow] = []
        while mark.row < start + count and mark.file < len(self.files):
            file = self.files[mark.file]
            read = _read_table if file.path.suffix == ".parquet" else _read_lines
            try:
                found, mark = read(file.path, mark, start, start + count)
            finally:
                file.check()  # Whatever went wrong, this would be why.
            rows += found
        return rows, mark


def _read_lines(path: Path, mark: Mark, start: int, stop: int) -> tuple[list[RawRow], Mark]:
    """Those of the rows [start, stop) that are in the file of `mark` and not before it; blank lines are no rows."""
    rows: list[RawRow] = []
    row, offset, number = mark.row, mark.offset, mark.line
    with path.open("rb") as file:
        file.seek(offset)
        while row < stop:
            line = file.readline(MAX_PIECE_BYTES + 1)
            if not line:
                return rows, Mark(row, mark.file + 1)
            offset, number = offset + len(line), number + 1
            if len(line) > MAX_PIECE_BYTES:
                raise too_long(path, number)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            if row >= start:
                rows.append((Place(str(path), number), _parse(text)))
            row += 1
    return rows, Mark(row, mark.file, offset, number)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode())  # Bytes would be taken for UTF-16 where they look like it.
    except (ValueError, RecursionError) as error:
        return Invalid("line is not valid JSON", str(error))


def _read_table(path: Path, mark: Mark, start: int, stop: int) -> tuple[list[RawRow], Mark]:
    """The same for Parquet; groups of rows that are not wanted are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[RawRow] = []
    try:
        with pq.ParquetFile(path) as table:
            before = mark.row - mark.offset  # rows of the source that stand before the file
            stop = min(stop, before + table.metadata.num_rows)
            at = before
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if max(at, start) < min(at + num_rows, stop):
                    wanted = range(max(start, at) - at, min(stop - at, num_rows))
                    rows += _read_group(table, path, group, wanted, at - before)
                at += num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return rows, Mark(at, mark.file + 1) if stop == at else Mark(stop, mark.file, stop - before, stop - before)


def _read_group(table: Any, path: Path, group: int, wanted: range, at: int) -> Iterator[RawRow]:
    """Some rows of a group whose first row is row `at` of the file; they are placed by their number there."""
    first = 0
    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group]):
        check_batch(batch, path, at + first + 1)
        start, stop = max(wanted.start, first), min(wanted.stop, first + len(batch))
        if start < stop:
            found = batch.slice(start - first, stop - start).to_pylist()
            yield from ((Place(str(path), at + number), row) for number, row in enumerate(found, start + 1))
        first += len(batch)
        if first >= wanted.stop:
            return


@dataclass(frozen=True)
class HubStream:
    """The rows of a Hugging Face dataset, in the version that it had when it was opened."""

    source: SourceConfig
    revision: str | None
    num_rows: int | None
    """As the dataset says."""

    @property
    def identity(self) -> str:
        return json.dumps([self.source.path, self.source.subset, self.source.split, self.revision])

    @cached_property
    def _opened(self) -> Any:
        """The dataset, which always goes on from a record: to open it takes a few questions to the hub."""
        return self.open()

    def open(self) -> Any:
        """The dataset, of which nothing is read yet."""
        import datasets

        source = self.source
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=self.revision, streaming=True
        )

    def read(self, mark: Mark, start: int, count: int) -> tuple[list[RawRow], Mark]:
        import pyarrow as pa
        from datasets.exceptions import DatasetsError
        from huggingface_hub import errors

        broken = (DatasetsError, pa.ArrowException, errors.HTTPError)  # type: ignore[attr-defined]  # from its own HTTP
        try:
            dataset = self._opened if mark.state else self.open()
            if mark.state:
                dataset.load_state_dict(dict(mark.state))
            rows = iter(dataset)
            num_skipped = sum(1 for _ in islice(rows, start - mark.row))
            found = list(islice(rows, count))
        except broken as error:
            raise OSError(f"the Hugging Face dataset {self.source.path} broke off: {error}") from error
        row = mark.row + num_skipped + len(found)
        if row < min(start + count, self.num_rows or 0):
            raise OSError(f"the Hugging Face dataset {self.source.path} ended after {row} of {self.num_rows} rows")
        placed = [(Place(self.source.path, number), row) for number, row in enumerate(found, start + 1)]
        return placed, Mark(row, state=dataset.state_dict())


def _open_hub(source: SourceConfig) -> HubStream:
    import huggingface_hub
    from datasets.exceptions import DatasetsError

    broken = (OSError, ValueError, DatasetsError, huggingface_hub.errors.HTTPError)  # type: ignore[attr-defined]
    try:
        revision = huggingface_hub.HfApi().dataset_info(source.path).sha
        stream = HubStream(source, revision, None)
        split = (stream.open().info.splits or {}).get(source.split)
    except broken as error:
        raise DataError(
            f"{source.path} is no file or folder here, and as a Hugging Face dataset (split {source.split!r}, "
            f"subset {source.subset!r}) it cannot be opened: {error}"
        ) from error
    return stream if split is None else replace(stream, num_rows=split.num_examples)
