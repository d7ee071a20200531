"""Sources -> chunks of tokenised rows in a folder, in a process of its own, ahead of their use.

Any number of processes of a machine may want the same chunks: whoever holds the lock of one builds it, the others build
another one or wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlx_distributed import __version__
from mlx_distributed.config.schema import DataConfig, SourceConfig
from mlx_distributed.data.chunks import Chunk, Damaged, Record, write_chunk
from mlx_distributed.data.formats import detect_format, normalise
from mlx_distributed.data.messages import Conversation, Invalid
from mlx_distributed.data.sources import DataReport
from mlx_distributed.data.streams import HEAD_ROWS, Mark, RawRow, Stream
from mlx_distributed.data.tokenize import Row, take, tokenize_rows
from mlx_distributed.errors import MlxDistributedError, StreamError

CHUNK_ROWS = 1024
"""Rows of a source that a chunk stands for."""
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Between two attempts to read a source that cannot be read."""

_POLL_S = 0.02
_NICENESS = 5
_TOKENIZED_BY = "max_seq_length overlong train_on train_on_eos alpaca_style merge_turns max_invalid_fraction"

Wanted = tuple[int, int]
"""A source and one of its chunks."""


@dataclass(frozen=True)
class Workshop:
    """Builds chunks of one source."""

    stream: Stream
    source: SourceConfig
    data: DataConfig
    tokenizer: Any
    """A fast tokenizer of transformers, with the chat template of the run."""
    cache_dir: Path
    chunk_rows: int = CHUNK_ROWS
    retry_after_s: Sequence[float] = RETRY_AFTER_S

    @cached_property
    def folder(self) -> Path:
        """Of the chunks: another one for anything that changes a token."""
        source = asdict(self.source) | {"path": None, "weight": None}
        tokenizer = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template]
        tokenizer.append(json.dumps(self.tokenizer.special_tokens_map, default=str, sort_keys=True))
        settings = {name: getattr(self.data, name) for name in _TOKENIZED_BY.split()}
        parts = [__version__, self.chunk_rows, self.stream.identity, source, settings, tokenizer]
        text = json.dumps(parts, sort_keys=True)
        return self.cache_dir / hashlib.sha256(text.encode()).hexdigest()[:32]

    def path(self, number: int) -> Path:
        """Of a chunk."""
        return self.folder / f"{number:08d}.rows"

    def build(self, number: int) -> bool:
        """Build a chunk unless it is there and whole. False where another process is about to.

        Raises:
            StreamError, DataError: its rows cannot be had, or too many of them cannot be used.
            OSError: it cannot be written.
        """
        with _try_lock(self.folder, number) as locked:
            if locked and not self._is_whole(number):
                start = number * self.chunk_rows
                raw, after = self._read(self._mark_before(number), start, self.chunk_rows)
                rows = self._tokenize(raw, start)
                write_chunk(self.path(number), rows, Record(after, ended=len(rows) < self.chunk_rows))
            return locked

    def _is_whole(self, number: int) -> bool:
        try:
            Chunk(self.path(number))
        except FileNotFoundError:
            return False
        except Damaged as damage:
            print(f"{self.path(number)} {damage}; it is built again", flush=True)
            return False
        return True

    def _mark_before(self, number: int) -> Mark:
        """The nearest place before a chunk that another chunk knows."""
        built = sorted(int(path.stem) for path in self.folder.glob("*.rows") if path.stem.isdecimal())
        for other in reversed([other for other in built if other < number]):
            with contextlib.suppress(FileNotFoundError, Damaged):
                return Chunk(self.path(other)).record.after
        return Mark()

    def _read(self, mark: Mark, start: int, count: int) -> tuple[list[RawRow], Mark]:
        """From the stream, which may break off for a while."""
        pauses_s = iter(self.retry_after_s)
        while True:
            try:
                return self.stream.read(mark, start, count)
            except OSError as error:
                pause_s = next(pauses_s, None)
                if pause_s is None:
                    raise StreamError(
                        f"{self.source.path} cannot be read from row {start + 1} on, and {len(self.retry_after_s)} "
                        f"more attempts within {sum(self.retry_after_s):g} s have not helped: {error}. When it can be "
                        "read again, --resume goes on"
                    ) from error
                print(f"{self.source.path} cannot be read ({error}); another attempt in {pause_s:g} s", flush=True)
                time.sleep(pause_s)

    @cached_property
    def _resolved(self) -> SourceConfig:
        """The source with its format, which its first rows decide."""
        if self.source.format != "auto":
            return self.source
        head, _ = self._read(Mark(), 0, HEAD_ROWS)
        return replace(self.source, format=detect_format((row for _, row in head), self.source))

    def _tokenize(self, raw: Sequence[RawRow], start: int) -> list[Row | None]:
        """A row for each, None where it cannot be trained on; many of these are told of, or refused.

        Raises:
            DataError: too many are invalid.
        """
        source = self._resolved
        assert source.format != "auto"
        found = [
            row if isinstance(row, Invalid) else normalise(row, source.format, source, self.data) for _, row in raw
        ]
        valid = [number for number, row in enumerate(found) if isinstance(row, Conversation)]
        conversations = [row for row in found if isinstance(row, Conversation)]
        invalid = [(place, row) for (place, _), row in zip(raw, found, strict=True) if isinstance(row, Invalid)]
        report = DataReport(num_rows=len(raw), max_seq_length=self.data.max_seq_length).add_invalid(invalid)
        data = replace(self.data, chat_template=None)  # The tokenizer has it.
        outcomes = tokenize_rows(conversations, self.tokenizer, data)
        tokenized, report = take(outcomes, [raw[number][0] for number in valid], self.data, report)
        if len(raw) == self.chunk_rows:  # The few that may stand at the end say nothing about the source.
            report.check(self.data.max_invalid_fraction)
        rows: list[Row | None] = [None] * len(raw)
        for number, row in zip(valid, tokenized, strict=True):
            rows[number] = row
        num_left = len(rows) - rows.count(None)
        if num_left < (1 - self.data.max_invalid_fraction) * len(rows):
            why = "; ".join(replace(report, num_train=num_left).lines()[1:])
            print(
                f"{self.source.path}: {num_left} of the {len(rows)} rows from row {start + 1} on are left: {why}",
                flush=True,
            )
        return rows


class Builder:
    """The process that builds for this one: it starts when something is to be built, and ends with this one, however
    that ends.

    Args:
        workshops: one for each source.
    """

    def __init__(self, workshops: Sequence[Workshop]) -> None:
        self._workshops = workshops
        self._asked: set[Wanted] = set()

    @cached_property
    def _running(self) -> tuple[Connection, BaseProcess]:
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(there, self._workshops), daemon=True)
        process.start()
        there.close()
        return here, process

    def ask(self, wanted: Wanted) -> None:
        """Have a chunk built; returns at once."""
        if wanted not in self._asked:
            self._asked.add(wanted)
            with contextlib.suppress(EOFError, OSError):  # `wait` tells why it has ended.
                line, _ = self._running
                while line.poll():  # Answers that nobody waits for would fill the line, and then both sides wait.
                    self._take(line)
                line.send(wanted)

    def wait(self, wanted: Wanted) -> None:
        """Have a chunk built, and wait until it is.

        Raises:
            StreamError: it cannot be.
        """
        self.ask(wanted)
        line, process = self._running
        while wanted in self._asked:
            try:
                done, error = self._take(line)
            except (EOFError, OSError):
                process.join()
                raise StreamError(
                    f"the process that tokenises rows ahead has ended with status {process.exitcode}; "
                    "--resume goes on from the last checkpoint"
                ) from None
            if error is not None and done == wanted:
                raise StreamError(error)

    def _take(self, line: Connection) -> tuple[Wanted, str | None]:
        """What has been built next, or why it could not be."""
        done, error = line.recv()
        self._asked.discard(done)
        return done, error

    def close(self) -> None:
        """End the process."""
        if "_running" in vars(self):
            line, process = self._running
            line.close()
            process.join()


def _serve(line: Connection, workshops: Sequence[Workshop]) -> None:
    """What the process does: build what is asked for, in that order, as far as no other process is at it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, which may need rows to come to an end.
    # The step that these rows are for is not due yet: the one under way has the cores.
    os.nice(_NICENESS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wanted: list[Wanted] = []
    with contextlib.suppress(EOFError, OSError):  # The worker has ended.
        while True:
            while not wanted or line.poll():
                wanted.append(line.recv())
            for source, number in wanted:
                built, error = _build(workshops[source], number)
                if built:
                    wanted.remove((source, number))
                    line.send(((source, number), error))
                    break
            else:
                line.poll(_POLL_S)


def _build(workshop: Workshop, number: int) -> tuple[bool, str | None]:
    """Whether no other process is at it, and what went wrong."""
    try:
        return workshop.build(number), None
    except MlxDistributedError as error:
        return True, str(error)
    except OSError as error:
        return True, f"tokenised rows cannot be kept: {error}; set data.cache_dir to a folder with room"


@contextlib.contextmanager
def _try_lock(folder: Path, number: int) -> Iterator[bool]:
    """Whether this process has the lock of a chunk, in the block; the system lets go of it for the dead."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True
