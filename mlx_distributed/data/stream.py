"""Training rows that are read while the run goes on, and which of them the micro-batches of step t hold.

Nobody owns data state here either. A block is the next so many rows of every source, valid or not, from which a fixed
number of steps is made: so the block of a step, and where its rows stand, follow from the number of the step alone.
Rows that cannot be trained on make the micro-batches of their block smaller. A source that ends begins again.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from mlx_distributed.config.schema import Config
from mlx_distributed.data.builder import Builder, Wanted, Workshop
from mlx_distributed.data.chunks import Chunk, Damaged, hold, remove_others
from mlx_distributed.data.plan import WINDOW_STEPS, Plan, random_keys
from mlx_distributed.data.streams import open_stream
from mlx_distributed.data.tokenize import Row
from mlx_distributed.errors import StreamError

MAX_OPEN = 2048
"""Chunks whose lengths are held, 20 kB each."""

_BLOCK = 0x626C6F  # the stream of keys that shuffles blocks


class Builds(Protocol):
    """What has chunks built; `Builder` is one."""

    def ask(self, wanted: Wanted) -> None: ...

    def wait(self, wanted: Wanted) -> None: ...


class StreamRows:
    """The rows of several sources without end, read from chunks on disk, which are built ahead.

    Args:
        workshops: one for each source.
        builder: of their chunks.
        own_cache: whether nobody else is meant to use the folder of the chunks, so that those of other settings are
            removed.
    """

    def __init__(self, workshops: Sequence[Workshop], builder: Builds, own_cache: bool = False) -> None:
        self.workshops, self._builder, self._own_cache = workshops, builder, own_cache
        self._claimed = False
        self._chunk = lru_cache(MAX_OPEN)(self._open)
        self._sizes: dict[int, int] = {}  # of the sources whose end is known, in rows

    def __getitem__(self, number: int) -> Row:
        """A row that can be trained on: row n of source s has the number n * sources + s."""
        row, source = divmod(number, len(self.workshops))
        chunk, at = divmod(self._within(source, row), self.workshops[source].chunk_rows)
        try:
            return self._chunk(source, chunk).read(at)
        except (OSError, Damaged):  # Somebody tidies up.
            self._chunk.cache_clear()
            return self._chunk(source, chunk).read(at)

    def lengths(self, source: int, rows: range) -> np.ndarray:
        """Of rows of a source in tokens, int32 [N]; 0 where one cannot be trained on. Waits until they are built.

        Raises:
            StreamError: the source is broken, empty, or not what it was.
        """
        found = [np.zeros(0, np.int32)]
        row = rows.start
        while row < rows.stop:
            number, at = divmod(self._within(source, row), self.workshops[source].chunk_rows)
            chunk = self._chunk(source, number)
            if chunk.record.ended:
                self._sizes[source] = chunk.record.after.row
            found.append(chunk.lengths[at : at + rows.stop - row])
            row += len(found[-1])
        return np.concatenate(found)

    def ask(self, source: int, rows: range) -> None:
        """Have the chunks of these rows built; returns at once."""
        workshop = self.workshops[source]
        for row in (*rows[:: workshop.chunk_rows], *rows[-1:]):
            number = self._within(source, row) // workshop.chunk_rows
            if not workshop.path(number).exists():
                self._builder.ask((source, number))

    def _within(self, source: int, row: int) -> int:
        """The row of a source that begins again when it has ended."""
        size = self._sizes.get(source)
        if size == 0:
            raise StreamError(f"{self.workshops[source].source.path} holds no rows any more")
        return row if size is None else row % size

    def _claim(self) -> None:
        """Keep others from removing the chunks while this is in use, and remove those that were left behind here."""
        folders = {workshop.folder: workshop.cache_dir for workshop in self.workshops}
        with contextlib.suppress(OSError):  # Chunks can be read where nothing can be written.
            for folder in folders:
                weakref.finalize(self, os.close, hold(folder))
            for cache_dir in set(folders.values()) if self._own_cache else ():
                remove_others(cache_dir, folders)

    def _open(self, source: int, number: int) -> Chunk:
        if not self._claimed:
            self._claimed = True
            self._claim()
        path = self.workshops[source].path(number)
        try:
            return Chunk(path)
        except (OSError, Damaged):
            self._builder.wait((source, number))
        try:
            return Chunk(path)
        except (OSError, Damaged) as error:
            raise StreamError(
                f"{path} has just been built, and cannot be read: {error}; nobody else may write to data.cache_dir"
            ) from error


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """The micro-batches of every step; takes the place of `Plan` where rows are streamed."""

    rows: StreamRows
    weights: tuple[float, ...]
    """Of the sources: in which proportion a block takes rows of them."""
    shuffle_buffer: int
    """Rows of a block, which are shuffled; rounded down to whole steps."""
    global_batch_size: int
    micro_batch_size: int
    num_steps: int
    seed: int = 0
    micro_batch_tokens: int | None = None
    packing: bool = False

    @property
    def num_microbatches(self) -> int:
        """Of a step; of the first one where micro-batches are limited by their tokens."""
        if self.micro_batch_tokens is not None:
            return len(self.microbatches(0))
        return self.global_batch_size // self.micro_batch_size

    @property
    def identity(self) -> str:
        """Equal where two workers, or two runs, are given the same rows in the same order."""
        workshops = self.rows.workshops
        return repr(([workshop.stream.identity for workshop in workshops], self.weights, self.shuffle_buffer))

    @property
    def steps_per_block(self) -> int:
        return max(self.shuffle_buffer // self.global_batch_size, 1)

    def microbatches(self, step: int) -> list[tuple[int, ...]]:
        """Row numbers of each micro-batch of step `step` (from 0). Raises StreamError."""
        number, at = divmod(step, self.steps_per_block)
        rows, plan = _block(self, number)
        return [tuple(rows[list(microbatch)].tolist()) for microbatch in plan.microbatches(at)]

    def wanted(self, block: int) -> list[range]:
        """The rows of each source that a block takes."""
        total = self.steps_per_block * self.global_batch_size
        edges = [round(total * sum(self.weights[:number]) / sum(self.weights)) for number in range(len(self.weights))]
        sizes = np.diff([*edges, total])
        return [range(block * size, (block + 1) * size) for size in sizes.tolist()]


@dataclass(frozen=True, eq=False)
class _Block(Plan):
    """A data set of its own, all of which is dealt out once, to a fixed number of steps."""

    num_block_steps: int = 1
    keys: tuple[int, ...] = ()
    """The stream of its random keys."""

    def groups(self, step: int) -> list[tuple[int, ...]]:
        rows, edges = self._dealt
        num = self.global_batch_size // self.group_size
        edges = edges[step * num : (step + 1) * num + 1]
        return [tuple(rows[start:stop].tolist()) for start, stop in pairwise(edges.tolist())]

    @cached_property
    def _dealt(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of all groups in the order of use, and where each group begins; as `Plan` has it, but that all steps
        have the same number of groups, and groups of a window differ by one row at most."""
        num_rows, num_steps = len(self.lengths), self.num_block_steps
        rows = np.argsort(random_keys(num_rows, *self.keys), kind="stable")
        lengths = np.asarray(self.lengths)
        found: list[np.ndarray] = []
        # The last window takes the rest, since a small window of its own would mix lengths badly.
        windows = [*range(0, max(num_steps // WINDOW_STEPS, 1) * WINDOW_STEPS, WINDOW_STEPS), num_steps]
        for start, stop in pairwise(windows):
            window = rows[num_rows * start // num_steps : num_rows * stop // num_steps]
            by_length = window[np.argsort(lengths[window], kind="stable")]
            num_groups = (stop - start) * self.global_batch_size // self.group_size
            groups = np.split(by_length, [len(window) * number // num_groups for number in range(1, num_groups)])
            order = np.argsort(random_keys(num_groups, *self.keys, start), kind="stable")
            found += [groups[number] for number in order]
        return np.concatenate(found), np.cumsum([0, *map(len, found)])


def open_stream_plan(config: Config, tokenizer: Any) -> StreamPlan:
    """The plan of a run with `data.streaming`, and its rows, of which none is built yet.

    Args:
        config: of the run.
        tokenizer: of transformers, or mlx-lm's wrapper around one, with the chat template of the run.

    Raises:
        DataError: a source is not there, or cannot be read in parts.
    """
    data, train = config.data, config.train
    tokenizer = tokenizer if callable(tokenizer) else tokenizer._tokenizer
    cache_dir = data.cache_dir or config.output_dir / "cache"
    workshops = [Workshop(open_stream(source), source, data, tokenizer, cache_dir) for source in data.train]
    assert train.max_steps is not None
    return StreamPlan(
        rows=StreamRows(workshops, Builder(workshops), own_cache=data.cache_dir is None),
        weights=tuple(source.weight for source in data.train),
        shuffle_buffer=data.shuffle_buffer,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        num_steps=train.max_steps,
        seed=config.seed,
        micro_batch_tokens=train.micro_batch_tokens,
        packing=data.packing,
    )


AnyPlan = Plan | StreamPlan
AnyRows = Sequence[Row] | StreamRows


@lru_cache(maxsize=2)
def _block(plan: StreamPlan, number: int) -> tuple[np.ndarray, _Block]:
    """Numbers of the rows of a block that can be trained on, and what is made of them."""
    wanted = plan.wanted(number)
    for source, rows in enumerate(wanted):
        plan.rows.ask(source, rows)
    lengths = np.concatenate([plan.rows.lengths(source, rows) for source, rows in enumerate(wanted)])
    # It is built while this one is trained on; and where that is soon done, some more.
    for source, rows in enumerate(plan.wanted(number + 1)):
        plan.rows.ask(source, range(rows.start, rows.stop + plan.rows.workshops[source].chunk_rows))
    numbers = np.concatenate([np.asarray(rows) * len(wanted) + source for source, rows in enumerate(wanted)])
    trainable = lengths > 0
    block = _Block(
        lengths=lengths[trainable].tolist(),
        spans=(),
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        micro_batch_tokens=plan.micro_batch_tokens,
        packing=plan.packing,
        num_block_steps=plan.steps_per_block,
        keys=(plan.seed, _BLOCK, number),
    )
    num_groups = plan.steps_per_block * plan.global_batch_size // block.group_size
    if len(block.lengths) < num_groups:
        raise StreamError(
            f"of the {len(lengths)} rows of steps {number * plan.steps_per_block + 1} to "
            f"{(number + 1) * plan.steps_per_block} only {len(block.lengths)} can be trained on, which leaves some of "
            f"their {num_groups} micro-batches empty; raise data.max_seq_length, or set data.overlong: truncate"
        )
    return numbers[trainable], block
