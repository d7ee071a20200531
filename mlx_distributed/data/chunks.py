"""Tokenised rows on disk: files of a few thousand rows, of which single rows can be read.

A file is a line with the version of the format and the SHA-256 of all that follows, a line of JSON (`Record`), and the
arrays: the lengths of the rows in tokens, int32 [N], where the last assistant turn stands in each, int32 [N, 2], and
row by row the tokens, int32 [L], and the loss mask, L bits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlx_distributed.data.streams import Mark
from mlx_distributed.data.tokenize import Row

VERSION = 1
"""Of the format. Goes up whenever an older program would misread a newer file."""

_USERS = "users"
"""Locked by all that use the chunks beside it."""
_FOLDER, _OURS = re.compile("[0-9a-f]{32}"), re.compile(rf"[0-9]{{8}}\.(rows|tmp-[0-9]+)|lock|{_USERS}")
_HEAD = re.compile(rb"mlx-distributed rows ([0-9]{1,9}) ([0-9a-f]{64})\n")


class Damaged(Exception):
    """A file of rows cannot be used; the message completes "the file ..."."""


@dataclass(frozen=True)
class Record:
    """What a file says about its rows."""

    after: Mark
    """Where the row after the last stands in the source."""
    ended: bool
    """There is none: the source has `after.row` rows."""


class Chunk:
    """An open file of rows, which has been checked. Only lengths and places are held in memory.

    Raises:
        OSError: it is not there, or cannot be read.
        Damaged: it is not whole, or was written by another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        head = _HEAD.match(data)
        if head is None:
            raise Damaged("is no file of rows")
        if int(head[1]) != VERSION:
            raise Damaged(f"was written by another version of this program (format {int(head[1])}, not {VERSION})")
        if hashlib.sha256(memoryview(data)[head.end() :]).hexdigest() != head[2].decode():
            raise Damaged("is damaged: its contents do not have the hash that it was written with")
        try:
            end = data.index(b"\n", head.end()) + 1
            fields = json.loads(data[head.end() : end])
            num_rows = fields.pop("num_rows")
            self.record = Record(Mark(**fields.pop("after")), **fields)
            self.lengths = np.frombuffer(data, np.int32, num_rows, end).copy()
            """Of every row in tokens, int32 [N]; 0 where it cannot be trained on."""
            end += self.lengths.nbytes
            self._references = np.frombuffer(data, np.int32, 2 * num_rows, end).reshape(-1, 2).copy()
            end += self._references.nbytes
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"was not written by this program: {error}") from error
        self._offsets = end + np.cumsum([0, *_sizes(self.lengths)])
        if self._offsets[-1] != len(data) or (self.lengths < 0).any():
            raise Damaged("was not written by this program: its rows are not as long as it says")

    def read(self, number: int) -> Row:
        """A row that can be trained on. Raises OSError or Damaged where the file is not there any more."""
        start, length = int(self._offsets[number]), int(self.lengths[number])
        with self.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), int(self._offsets[number + 1]) - start, start)
        if len(data) != self._offsets[number + 1] - start:
            raise Damaged("has become shorter")
        mask = np.unpackbits(np.frombuffer(data, np.uint8, offset=4 * length), count=length).view(np.bool_)
        first, stop = self._references[number].tolist()
        return Row(np.frombuffer(data, np.int32, length), mask, (first, stop))


def write_chunk(path: Path, rows: Sequence[Row | None], record: Record) -> None:
    """Write rows, None where one is left out; the file is there at once and whole, or not at all. Raises OSError."""
    lengths = np.array([0 if row is None else len(row.tokens) for row in rows], np.int32)
    references = np.array([(0, 0) if row is None else row.reference for row in rows], np.int32)
    fields = json.dumps(asdict(record) | {"num_rows": len(rows)})
    parts = [fields.encode() + b"\n", lengths.tobytes(), references.tobytes()]
    for row in rows:
        if row is not None:
            parts += [row.tokens.astype("<i4").tobytes(), np.packbits(row.loss_mask).tobytes()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(b"mlx-distributed rows %d %s\n" % (VERSION, digest.hexdigest().encode()))
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def hold(folder: Path) -> int:
    """Say that this process uses the chunks in a folder, until the descriptor is closed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def remove_others(cache_dir: Path, kept: Collection[Path]) -> None:
    """Remove the folders of chunks in `cache_dir` but for those that are kept, and those that a process uses; and
    nothing in them that is not ours."""
    for folder in list(cache_dir.iterdir()):
        if folder in kept or folder.is_symlink() or not _FOLDER.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError), (folder / _USERS).open("ab") as users:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in list(folder.iterdir()):
                if _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)  # Another worker of the run removes them at the same time.
            folder.rmdir()


def _sizes(lengths: np.ndarray) -> np.ndarray:
    """Bytes of the tokens and the mask of rows."""
    return 4 * lengths.astype(np.int64) + (lengths + 7) // 8
