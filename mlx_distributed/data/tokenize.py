"""Conversations -> rows of tokens with the targets marked.

Shapes: L tokens.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from mlx_distributed.config.schema import DataConfig
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import Conversation, Invalid
from mlx_distributed.data.sources import Corpus, DataReport
from mlx_distributed.data.spans import Layout, lay_out
from mlx_distributed.data.template import ChatTemplate
from mlx_distributed.errors import DataError

CHUNK = 512
"""Conversations tokenised at once, which the tokenizer does on all cores."""


@dataclass(frozen=True, eq=False)
class Row:
    tokens: np.ndarray
    """int32 [L]."""
    loss_mask: np.ndarray
    """bool [L], True where the token is a target; never the first token, which nothing predicts."""
    reference: tuple[int, int] = (0, 0)
    """First token of the last assistant turn, and the token after its last, its stop token not counted."""
    num_cut: int = 0
    """Tokens beyond `data.max_seq_length`, which the row has lost."""


@dataclass(frozen=True)
class TokenizedCorpus:
    train: list[Row]
    validation: list[Row]
    train_places: tuple[Place, ...]
    """Where each row of `train` stands."""
    validation_places: tuple[Place, ...]
    weights: tuple[tuple[int, int, float], ...]
    """Per source: its first row in `train`, the row after its last, and its weight."""
    report: DataReport
    train_digest: str
    """SHA-256 of the tokens and masks of `train` and of `weights`: equal where two workers train on the same."""
    validation_digest: str


class Outcome(NamedTuple):
    """What became of a conversation."""

    num_tokens: int
    """Of all of it, however long; 0 where it is invalid."""
    row: Row | None
    """None where it is left out: invalid, too long, or without a trainable token."""
    invalid: Invalid | None = None


class _Turn(NamedTuple):
    """An assistant turn in tokens: it says ``[start, end)``, and its stop token ends at `stop`."""

    start: int
    end: int
    stop: int


class _Encoded(NamedTuple):
    ids: list[int]
    turns: list[_Turn]


def tokenize_corpus(corpus: Corpus, tokenizer: Any, data: DataConfig) -> TokenizedCorpus:
    """Tokenise all rows, through the chat template where a row is not raw, and check each row's targets.

    A row is refused when its labels, decoded, are not the text of its assistant turns. Rows longer than
    `max_seq_length` are treated as `overlong` says, and rows without a trainable token are left out.

    Args:
        corpus: from `read_corpus`.
        tokenizer: a fast tokenizer of transformers, or mlx-lm's wrapper around one.
        data: the `data` section.

    Raises:
        DataError: no chat template or no end token where one is needed; too many rows refused; a row too long under
            ``overlong: error``; no row left.
    """
    return assemble(
        corpus, tokenize_rows(corpus.train, tokenizer, data), tokenize_rows(corpus.validation, tokenizer, data), data
    )


def tokenize_rows(conversations: Sequence[Conversation], tokenizer: Any, data: DataConfig) -> Iterator[Outcome]:
    """What becomes of each conversation, in order; `overlong: error` is for `assemble`, and is taken as `drop` here.

    Raises:
        DataError: no chat template or no end token where one is needed.
    """
    for encoded in _Encoder(tokenizer, data).encode(conversations):
        if isinstance(encoded, Invalid):
            yield Outcome(0, None, encoded)
            continue
        num_tokens = len(encoded.ids)
        row = _row(encoded, data) if num_tokens <= data.max_seq_length or data.overlong == "truncate" else None
        yield Outcome(num_tokens, row if row is not None and row.loss_mask.any() else None)


def assemble(
    corpus: Corpus, train_outcomes: Iterable[Outcome], validation_outcomes: Iterable[Outcome], data: DataConfig
) -> TokenizedCorpus:
    """What `tokenize_corpus` makes of the outcomes of a corpus.

    Raises:
        DataError: too many rows refused; a row too long under ``overlong: error``; no row left.
    """
    train, report = take(train_outcomes, corpus.train_places, data, corpus.report)
    validation, report = take(validation_outcomes, corpus.validation_places, data, report)
    report.check(data.max_invalid_fraction)
    kept = np.cumsum([0, *(row is not None for row in train)]).tolist()
    weights = tuple((kept[start], kept[stop], weight) for start, stop, weight in corpus.train_weights)
    train_rows, train_places = _kept(train, corpus.train_places)
    validation_rows, validation_places = _kept(validation, corpus.validation_places)
    report = replace(report, num_train=len(train_rows), num_validation=len(validation_rows))
    for name, rows, given in (("training", train_rows, train), ("validation", validation_rows, validation)):
        if given and not rows:
            raise DataError(
                f"none of the {len(given)} {name} rows is left: of all {report.num_rows} rows, validation too, "
                f"{report.num_dropped} are longer than "
                f"data.max_seq_length={data.max_seq_length} tokens, {report.num_untrainable} have no trainable token, "
                f"{sum(report.invalid.values())} are invalid; raise data.max_seq_length or mend the rows"
            )
    digests = _digest(train_rows, weights), _digest(validation_rows, ())
    return TokenizedCorpus(train_rows, validation_rows, train_places, validation_places, weights, report, *digests)


def prompt_and_reference(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before the last assistant turn, and those of that turn without its stop token, both int32 [L]."""
    start, end = row.reference
    return row.tokens[:start], row.tokens[start:end]


def take(
    outcomes: Iterable[Outcome], places: Sequence[Place], data: DataConfig, report: DataReport
) -> tuple[list[Row | None], DataReport]:
    """A row for every outcome, None where it is left out, and `report` with what was found added."""
    rows: list[Row | None] = []
    invalid: list[tuple[Place, Invalid]] = []
    num_overlong = num_untrainable = 0
    for (num_tokens, row, refused), place in zip(outcomes, places, strict=True):
        rows.append(row)
        if refused is not None:
            invalid.append((place, refused))
            continue
        overlong = num_tokens > data.max_seq_length
        if overlong and data.overlong == "error":
            raise DataError(
                f"{place}: the row has {num_tokens} tokens, more than data.max_seq_length="
                f"{data.max_seq_length}; raise it, or set data.overlong to drop or truncate"
            )
        num_overlong += overlong
        num_untrainable += row is None and not (overlong and data.overlong == "drop")
    counted = "num_truncated" if data.overlong == "truncate" else "num_dropped"
    report = replace(report, **{counted: getattr(report, counted) + num_overlong})
    report = replace(report, num_untrainable=report.num_untrainable + num_untrainable)
    return rows, report.add_invalid(invalid)


def _row(encoded: _Encoded, data: DataConfig) -> Row:
    """Tokens and mask, cut to `max_seq_length`."""
    limit = data.max_seq_length
    tokens = np.asarray(encoded.ids[:limit], np.int32)
    loss_mask = np.full(len(encoded.ids), data.train_on == "all")
    for turn in encoded.turns[-1:] if data.train_on == "last" else encoded.turns:
        loss_mask[turn.start : turn.stop] = True
        if not data.train_on_eos:
            loss_mask[turn.end : turn.stop] = False
    loss_mask[:1] = False
    shown = [turn for turn in encoded.turns if turn.start < limit]
    reference = (shown[-1].start, min(shown[-1].end, limit)) if shown else (0, 0)
    return Row(tokens, loss_mask[:limit], reference, len(encoded.ids) - len(tokens))


def _kept(rows: Sequence[Row | None], places: Sequence[Place]) -> tuple[list[Row], tuple[Place, ...]]:
    """The rows that are not left out, and where they stand."""
    kept = [(row, place) for row, place in zip(rows, places, strict=True) if row is not None]
    return [row for row, _ in kept], tuple(place for _, place in kept)


class _Encoder:
    """Conversations -> token ids and where the assistant turns stand."""

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self._data = data
        # mlx-lm's wrapper forwards attributes only, and offsets come from calling the tokenizer.
        self._tokenizer = tokenizer if callable(tokenizer) else tokenizer._tokenizer
        if not self._tokenizer.is_fast:
            raise DataError("the tokenizer tells no offsets; use a model folder that has a tokenizer.json")
        self._template = ChatTemplate(tokenizer, data.chat_template)
        ids, bare = self._tokenizer("a").input_ids, self._ids("a")
        self._begin = ids[:1] if ids[:1] != bare[:1] and ids[0] == self._tokenizer.bos_token_id else []

    def encode(self, conversations: Sequence[Conversation]) -> Iterator[_Encoded | Invalid]:
        """In order, one for each conversation."""
        for start in range(0, len(conversations), CHUNK):
            chunk = conversations[start : start + CHUNK]
            layouts = [None if self._is_raw(conversation) else self._lay_out(conversation) for conversation in chunk]
            texts = [layout.text for layout in layouts if isinstance(layout, Layout)]
            # The text has the special tokens that the template's author wanted: adding more would double the first.
            tokenized: Iterator[tuple[list[int], list[tuple[int, int]]]] = iter(())
            if texts:
                encodings = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                tokenized = zip(encodings["input_ids"], encodings["offset_mapping"], strict=True)
            for conversation, layout in zip(chunk, layouts, strict=True):
                if layout is None:
                    yield self._encode_raw(conversation)
                elif isinstance(layout, Invalid):
                    yield layout
                else:
                    yield self._locate(layout, *next(tokenized))

    def _is_raw(self, conversation: Conversation) -> bool:
        return conversation.raw or (conversation.raw_fallback and not self._template.exists)

    def _lay_out(self, conversation: Conversation) -> Layout | Invalid:
        if not self._template.exists:
            raise DataError(
                "the tokenizer has no chat template, and the data are conversations; set data.chat_template to Jinja "
                "text or a file with it, or data.alpaca_style to classic where the data are Alpaca rows"
            )
        return lay_out(conversation, self._template)

    def _locate(self, layout: Layout, ids: list[int], offsets: list[tuple[int, int]]) -> _Encoded | Invalid:
        """Turns from characters to tokens, by position: the token of padding or of a stop may stand elsewhere too."""
        first, after = itemgetter(0), itemgetter(1)
        turns = []
        for span in layout.spans:
            start = bisect_right(offsets, span.start, key=after)
            if start < len(offsets) and _is_of_header(layout.text, span.start, *offsets[start]):
                start += 1
            end = bisect_left(offsets, span.end, lo=start, key=first)
            stop = bisect_left(offsets, span.stop, lo=end, key=first)
            turns.append(_Turn(start, end, stop))
            if not self._reads(ids[start:end], layout.text[span.start : span.end]):
                return Invalid("the labels of an assistant turn do not decode to its text")
            stop_text = layout.text[span.end : span.stop].strip()
            if stop_text and self._tokenizer.convert_ids_to_tokens(ids[stop - 1]) != stop_text:
                return Invalid("the stop token of an assistant turn is not one token")
        last = layout.spans[-1]
        if last.stop == last.end and not layout.text[last.end :].strip():
            return self._add_eos(_Encoded(ids, turns))
        return _Encoded(ids, turns)

    def _encode_raw(self, conversation: Conversation) -> _Encoded | Invalid:
        """Pieces tokenised one by one and joined, so that the end of a prompt never depends on its answer."""
        ids: list[int] = []
        turns = []
        for message in conversation.messages:
            piece = self._ids(message.content)
            if message.role == "assistant":
                if not self._reads(piece, message.content):
                    return Invalid("the labels of an assistant turn do not decode to its text")
                turns.append(_Turn(len(ids), len(ids) + len(piece), len(ids) + len(piece)))
            ids += piece
        if self._begin and ids[:1] != self._begin:
            ids = self._begin + ids
            turns = [_Turn(*(at + 1 for at in turn)) for turn in turns]
        return self._add_eos(_Encoded(ids, turns))

    def _add_eos(self, encoded: _Encoded) -> _Encoded:
        """With the eos token as the stop of the last turn, where nothing else ends it and it is trained on."""
        if not self._data.train_on_eos:
            return encoded
        if self._tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos token to end a turn with; set data.train_on_eos to false")
        ids = [*encoded.ids, self._tokenizer.eos_token_id]
        return _Encoded(ids, [*encoded.turns[:-1], encoded.turns[-1]._replace(stop=len(ids))])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _reads(self, ids: list[int], text: str) -> bool:
        """Whether `ids` decode to `text`, but for white space around it and what the tokenizer itself normalises."""
        decoded = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        decoded, text = decoded.strip(), text.strip()
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        if decoded == text or normalizer is None:
            return bool(decoded == text)
        return bool(normalizer.normalize_str(decoded) == normalizer.normalize_str(text))


def _is_of_header(text: str, at: int, start: int, end: int) -> bool:
    """Whether the token ``[start, end)`` ends the header of the turn at `at`, and took white space from the turn, as
    the special tokens of some tokenizers do."""
    return bool(text[start:at].strip()) and not text[at:end].strip()


def _digest(rows: list[Row], weights: tuple[tuple[int, int, float], ...]) -> str:
    digest = hashlib.sha256(repr((len(rows), weights)).encode())
    for row in rows:
        digest.update(len(row.tokens).to_bytes(8, "little"))
        digest.update(row.tokens.astype("<i4").tobytes() + row.loss_mask.tobytes())
    return digest.hexdigest()
