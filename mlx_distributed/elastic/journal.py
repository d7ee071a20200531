"""The coordinator's journal: a line per record, on disk before anybody is told.

A line is the CRC-32 of what follows, as 8 hexadecimal digits, a space, and the record as a JSON object. A crash can
tear only the last line, which nobody was told of: it is cut off. Any other damage is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_distributed.elastic.protocol import (
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

_KINDS = {
    "run": RunRecord,
    "term": TermRecord,
    "epoch": EpochRecord,
    "commit": CommitRecord,
    "rollback": RollbackRecord,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Journal:
    """An open journal, this process's alone.

    Args:
        path: of the file, made if it is not there.

    Raises:
        ConfigError: it cannot be opened, another coordinator has it open, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be opened: {error.strerror}") from None
        try:
            self._take()
            self._file.seek(0)
            data = self._file.read()
            self.records, num_bytes = parse(data, str(path))
            """What was in it on opening."""
            if num_bytes < len(data):
                self._file.truncate(num_bytes)
                os.fsync(self._file.fileno())
        except ConfigError:
            self._file.close()
            raise
        if not data:
            _sync_folder(path.parent)

    def append(self, record: Record) -> None:
        """Put a record on disk; it is there when this returns.

        Raises:
            OSError: the disk does not take it; the journal may end in a torn line.
        """
        data = memoryview(encode(record))
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another coordinator is at work with the journal {self.path}: a run has one coordinator; end that one "
                "first, or join its run"
            ) from None


def encode(record: Record) -> bytes:
    """The line of a record."""
    text = json.dumps({"kind": _NAMES[type(record)], **vars(record)}, default=vars, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse(data: bytes, name: str) -> tuple[list[Record], int]:
    """The records of a journal, and how many of its bytes are whole lines.

    Args:
        data: all bytes of the journal.
        name: of the file, for errors.

    Raises:
        ConfigError: a line is damaged that is not a torn last one.
    """
    records: list[Record] = []
    lines, num_bytes = data.split(b"\n"), 0
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(_decode(line))
        except (ValueError, KeyError, TypeError):
            # A crash while the file grew can leave zeros in place of the last line's beginning.
            if number == len(lines) - 1 and not lines[-1] and b"\0" in line:
                break
            raise ConfigError(
                f"the journal {name} is damaged in line {number}: its checksum does not fit; move the journal away and "
                "start again with --resume to go on from the last checkpoint"
            ) from None
        num_bytes += len(line) + 1
    return records, num_bytes


def _decode(line: bytes) -> Record:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("checksum")
    fields: dict[str, Any] = json.loads(text)
    match fields.pop("kind"):
        case "run":
            return RunRecord(**fields)
        case "term":
            return TermRecord(**fields)
        case "epoch":
            return EpochRecord(_epoch(**fields["epoch"]))
        case "commit":
            return CommitRecord(Outcome(*fields["outcome"]), tuple(fields["weights"]))
        case "rollback":
            return RollbackRecord(Outcome(*fields["outcome"]))
    raise ValueError("kind")


def _epoch(id: Sequence[int], committed: Sequence[Any], seats: Sequence[dict[str, Any]], reason: str) -> Epoch:
    # The name of a worker and the number of its process are a list in JSON.
    places = tuple(Seat(**{**seat, "worker": WorkerId(*seat["worker"])}) for seat in seats)
    return Epoch(EpochId(*id), Outcome(*committed), places, reason)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
