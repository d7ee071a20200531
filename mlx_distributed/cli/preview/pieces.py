"""What a preview shows: rows and micro-batches as the model is given them, in pieces of text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from mlx_distributed.config import Config
from mlx_distributed.data.batch import Batch, make_batch
from mlx_distributed.data.files import Place
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.tokenize import Row, TokenizedCorpus
from mlx_distributed.errors import ConfigError

Split = Literal["train", "validation"]

_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Zl", "Zp"}
"""Categories of characters that cannot be seen, or change how others are shown."""
_JOINERS = "\u200c\u200d"
"""Of letters and of emoji."""


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other and are of one kind, decoded."""

    text: str
    """Characters that cannot be seen are written as in Python, but for line breaks."""
    is_label: bool
    is_special: bool
    """Tokens that the tokenizer has beside its vocabulary, such as ``<|im_end|>``."""
    num_tokens: int


@dataclass(frozen=True)
class ShownRow:
    number: int
    """From 1, of those that are left in its split."""
    place: Place
    pieces: tuple[Piece, ...]
    num_cut: int
    """Tokens that the row has lost to `data.max_seq_length`."""
    num_padding: int = 0
    """Tokens of padding behind it."""

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_labels(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces if piece.is_label)


@dataclass(frozen=True)
class Section:
    """Rows of a split, or a micro-batch."""

    title: str
    rows: tuple[ShownRow, ...]
    is_packed: bool = False
    """Whether the rows stand one after the other in one sequence."""


class Viewer:
    """Takes rows and micro-batches apart.

    Args:
        config: of the run.
        tokenizer: of transformers, or mlx-lm's wrapper around one.
        rows: all of the run.
        plan: None where rows are streamed.
    """

    def __init__(self, config: Config, tokenizer: Any, rows: TokenizedCorpus, plan: Plan | None) -> None:
        self._config, self._tokenizer, self._rows, self._plan = config, tokenizer, rows, plan
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), np.int32)

    def rows(self, split: Split, first: int, count: int) -> Section:
        """Rows from number `first` on.

        Raises:
            ConfigError: there is no such row.
        """
        rows, places = self._split(split)
        if not rows:
            raise ConfigError(
                "--split validation: the run has no validation rows; give it some with data.validation or "
                "data.val_fraction, or look at --split train"
            )
        if first > len(rows):
            raise ConfigError(f"--row {first}: {split} has {len(rows)} rows; give a number from 1 to {len(rows)}")
        numbers = range(first, min(first + count, len(rows) + 1))
        shown = [self._show(number, places[number - 1], rows[number - 1]) for number in numbers]
        which = f"row {first}" if len(numbers) == 1 else f"rows {numbers[0]} to {numbers[-1]}"
        return Section(f"{split}: {which} of {len(rows)}", tuple(shown))

    def step(self, step: int) -> list[Section]:
        """The micro-batches of a step, from 1.

        Raises:
            ConfigError: there is no such step, or it cannot be known before the run.
        """
        if self._plan is None:
            raise ConfigError(
                f"--step {step}: with data.streaming=true the rows of a step are read while the run goes on; look at "
                "the first rows with --rows instead"
            )
        if step > self._plan.num_steps:
            last = self._plan.num_steps
            raise ConfigError(f"--step {step}: the run has {last} steps; give one of 1 to {last}")
        microbatches = self._plan.microbatches(step - 1)
        return [
            self._microbatch(f"step {step}, micro-batch {number} of {len(microbatches)}", rows)
            for number, rows in enumerate(microbatches, 1)
        ]

    def _microbatch(self, name: str, numbers: Sequence[int]) -> Section:
        rows, places = self._split("train")
        batch = make_batch([rows[number] for number in numbers], self._config)
        if batch.groups is not None:
            numbers = sorted(numbers, key=lambda number: len(rows[number].tokens))  # as `pack` lays them
        shown = []
        for number, (tokens, loss_mask) in zip(numbers, _places_in(batch, [rows[n] for n in numbers]), strict=True):
            length = len(rows[number].tokens)
            row = Row(tokens[:length], loss_mask[:length], num_cut=rows[number].num_cut)
            shown.append(self._show(number + 1, places[number], row, len(tokens) - length))
        num_padding = sum(row.num_padding for row in shown)
        size = f"{batch.tokens.size} tokens, {num_padding} of padding ({num_padding / batch.tokens.size:.1%})"
        how = "packed into one sequence" if batch.groups is not None else "side by side"
        title = f"{name}: {len(shown)} rows {how}, {size}, {batch.num_labels} labels"
        return Section(title, tuple(shown), batch.groups is not None)

    def _split(self, split: Split) -> tuple[list[Row], tuple[Place, ...]]:
        rows = self._rows
        return (rows.train, rows.train_places) if split == "train" else (rows.validation, rows.validation_places)

    def _show(self, number: int, place: Place, row: Row, num_padding: int = 0) -> ShownRow:
        special = np.isin(row.tokens, self._added)
        kinds = list(zip(row.loss_mask.tolist(), special.tolist(), strict=True))
        pieces, text, end = [], "", 0
        for (is_label, is_special), run in groupby(kinds):
            size = len(list(run))
            end += size
            # What some tokenizers decode depends on the tokens before, as white space at the beginning of a text does.
            whole = self._decode(row.tokens[:end])
            pieces.append(Piece(visible(whole[len(text) :]), is_label, is_special, size))
            text = whole
        return ShownRow(number, place, tuple(pieces), row.num_cut, num_padding)

    def _decode(self, tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def visible(text: str) -> str:
    """`text` with everything that cannot be seen written as in Python, such as ``\\x1b``, but for line breaks."""

    def show(character: str) -> str:
        hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
        return character.encode("unicode_escape").decode() if hidden and character != "\n" else character

    return text if text.isascii() and text.isprintable() else "".join(map(show, text))


def _places_in(batch: Batch, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and loss mask of each row in a micro-batch, with the padding behind it."""
    if batch.groups is None:
        return list(zip(batch.tokens, batch.loss_mask, strict=True))
    edges = np.cumsum([len(row.tokens) for row in rows])[:-1]
    return list(zip(np.split(batch.tokens[0], edges), np.split(batch.loss_mask[0], edges), strict=True))
