"""The configured sources as conversations: read, normalised, split, and with a report of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlx_distributed.config.schema import DataConfig, SourceConfig
from mlx_distributed.data.files import Place, read_rows
from mlx_distributed.data.formats import OPTIONAL, REQUIRED, ConcreteFormat, detect_format, normalise
from mlx_distributed.data.messages import Conversation, Invalid
from mlx_distributed.data.plan import random_keys
from mlx_distributed.data.streams import HEAD_ROWS, Mark, open_stream
from mlx_distributed.errors import DataError, StreamError

NUM_EXAMPLES = 5
"""Invalid rows that are shown."""

_VALIDATION = 0x76616C  # the stream of keys that chooses validation rows


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. `str()` is the text for the console."""

    num_rows: int = 0
    """Rows read, valid or not, training and validation together."""
    num_train: int = 0
    num_validation: int = 0
    invalid: Mapping[str, int] = field(default_factory=dict)
    """Number of rows refused, by reason."""
    examples: tuple[str, ...] = ()
    """The first rows refused: file, line, and the reason in full."""
    num_dropped: int = 0
    """Rows longer than `data.max_seq_length`, left out."""
    num_truncated: int = 0
    """The same, cut."""
    num_untrainable: int = 0
    """Rows without a trainable token, left out."""
    max_seq_length: int = 0
    streaming: bool = False
    """Of the training rows only the first of each source have been read."""

    def add_invalid(self, found: Sequence[tuple[Place, Invalid]]) -> DataReport:
        counts = Counter(self.invalid)
        counts.update(invalid.reason for _, invalid in found)
        shown = tuple(f"{place}: {invalid}" for place, invalid in found)
        return replace(self, invalid=dict(counts), examples=(self.examples + shown)[:NUM_EXAMPLES])

    def check(self, max_invalid_fraction: float) -> None:
        """Raise DataError when too large a share of the rows is invalid."""
        num_invalid = sum(self.invalid.values())
        if num_invalid > max_invalid_fraction * self.num_rows:
            raise DataError(
                f"{num_invalid} of {self.num_rows} rows are invalid ({self.summary}), a larger share than "
                f"data.max_invalid_fraction={max_invalid_fraction:g} allows. "
                "Mend them, or set `format`, `columns` or `roles` of the source to what they are"
            )

    @property
    def reasons(self) -> str:
        """Counts per reason, the most frequent first."""
        counted = sorted(self.invalid.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {reason}" for reason, count in counted)

    @property
    def summary(self) -> str:
        """Counts per reason and the first rows refused, in one line."""
        return f"{self.reasons}; the first: {'; '.join(self.examples)}"

    def lines(self) -> list[str]:
        rows = "first rows read; the others will be when they are needed" if self.streaming else "rows read"
        lines = [f"{rows}: {self.num_rows} ({self.num_train} to train on, {self.num_validation} for validation)"]
        if self.invalid:
            lines.append(f"invalid rows skipped: {sum(self.invalid.values())} ({self.reasons})")
            lines += [f"  {example}" for example in self.examples]
        for count, what in (
            (self.num_dropped, f"longer than {self.max_seq_length} tokens, dropped"),
            (self.num_truncated, f"longer than {self.max_seq_length} tokens, truncated"),
            (self.num_untrainable, "without a trainable token, dropped"),
        ):
            if count:
                lines.append(f"rows {what}: {count}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Corpus:
    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]
    train_weights: tuple[tuple[int, int, float], ...]
    """Per source: its first row in `train`, the row after its last, and its weight."""
    train_places: tuple[Place, ...]
    validation_places: tuple[Place, ...]
    report: DataReport
    refused: tuple[tuple[Place, Invalid], ...] = ()
    """The rows that are in neither."""
    empty_sources: tuple[str, ...] = ()
    """Those without a valid row: key and path."""

    def check(self, data: DataConfig) -> None:
        """Raise DataError where there is too little to train on, or to validate with."""
        report = self.report
        report.check(data.max_invalid_fraction)
        if self.empty_sources:
            raise DataError(
                f"{' and '.join(self.empty_sources)}: no valid row; {report.summary}. Mend the rows or remove the "
                "source"
            )
        if not self.train or (data.val_fraction and not self.validation):
            raise DataError(
                f"of {report.num_rows} rows, {report.num_train} are left to train on and {report.num_validation} for "
                f"validation (data.val_fraction={data.val_fraction:g}); both need at least one: change val_fraction or "
                "give more rows"
            )


def read_corpus(data: DataConfig, seed: int) -> Corpus:
    """Read all sources of a configuration.

    Args:
        data: the `data` section.
        seed: chooses the validation rows where `val_fraction` is set.

    Raises:
        DataError: a source is missing, unreadable, empty or of no known format; too many rows are invalid; nothing is
            left to train on or to validate with.
    """
    corpus = gather(data, seed)
    corpus.check(data)
    return corpus


def gather(data: DataConfig, seed: int) -> Corpus:
    """As `read_corpus`, but however few rows are valid."""
    train: list[tuple[Conversation, Place]] = []
    validation: list[tuple[Conversation, Place]] = []
    report = DataReport(max_seq_length=data.max_seq_length, streaming=data.streaming)
    weights: list[tuple[int, int, float]] = []
    refused: list[tuple[Place, Invalid]] = []
    empty_sources: list[str] = []
    for key, sources in (("data.train", data.train), ("data.validation", data.validation)):
        for number, source in enumerate(sources):
            rows = _read(source, data, f"{key}.{number}")
            valid = [(at, place, row) for at, (place, row) in enumerate(rows) if isinstance(row, Conversation)]
            refused += [(place, row) for place, row in rows if isinstance(row, Invalid)]
            report = replace(report, num_rows=report.num_rows + len(rows))
            if not valid:
                empty_sources.append(f"{key}.{number} ({source.path})")
            held_out = np.full(len(rows), key == "data.validation")
            if key == "data.train":
                held_out = choose_validation(len(rows), data.val_fraction, seed)
            start = len(train)
            for at, place, row in valid:
                (validation if held_out[at] else train).append((row, place))
            if key == "data.train":
                weights.append((start, len(train), source.weight))
    return Corpus(
        train=tuple(conversation for conversation, _ in train),
        validation=tuple(conversation for conversation, _ in validation),
        train_weights=tuple(weights),
        train_places=tuple(place for _, place in train),
        validation_places=tuple(place for _, place in validation),
        report=replace(report, num_train=len(train), num_validation=len(validation)).add_invalid(refused),
        refused=tuple(refused),
        empty_sources=tuple(empty_sources),
    )


def read_head(source: SourceConfig) -> list[tuple[Place, object]]:
    """The first rows of a source that is streamed.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        rows, _ = open_stream(source).read(Mark(), 0, HEAD_ROWS)
    except (OSError, StreamError) as error:
        raise DataError(f"{source.path} cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{source.path} holds no rows; give a file with at least one")
    return rows


def choose_validation(num_rows: int, fraction: float, seed: int) -> np.ndarray:
    """Which rows of a source are held out, bool [num_rows].

    Decided row by row from (seed, position in its source) alone, so that a row keeps its side when rows are appended,
    become invalid, or other sources come and go.
    """
    return random_keys(num_rows, seed, _VALIDATION) / 2**64 < fraction


def _read(source: SourceConfig, data: DataConfig, key: str) -> list[tuple[Place, Conversation | Invalid]]:
    rows = read_head(source) if data.streaming and key.startswith("data.train") else read_rows(source)
    format: ConcreteFormat
    format = detect_format((row for _, row in rows), source) if source.format == "auto" else source.format
    known = REQUIRED[format] + OPTIONAL[format]
    for column in source.columns:
        if column not in known:
            raise DataError(f"{key}.columns names {column!r}, but the format {format} has {', '.join(known)}")
    return [(place, row if isinstance(row, Invalid) else normalise(row, format, source, data)) for place, row in rows]
