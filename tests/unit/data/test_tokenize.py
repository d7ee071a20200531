from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from mlx_distributed.config.schema import DataConfig
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import MARKS, Conversation, Message
from mlx_distributed.data.sources import Corpus, DataReport
from mlx_distributed.data.tokenize import Row, TokenizedCorpus, collate, prompt_and_reference, tokenize_corpus
from mlx_distributed.errors import DataError

Make = Callable[..., PreTrainedTokenizerFast]
Tokenizer = PreTrainedTokenizerFast | TokenizerWrapper
EOS = "<|im_end|>"


def talk(*contents: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)))  # type: ignore[arg-type]


def raw(*contents: str) -> Conversation:
    return Conversation(talk(*contents).messages, raw=True)


def text(content: str) -> Conversation:
    return Conversation((Message("assistant", content),), raw=True)


def corpus(train: list[Conversation], validation: list[Conversation] | None = None, **fields: Any) -> Corpus:
    validation = validation or []
    places = [Place("rows.jsonl", line + 1) for line in range(len(train) + len(validation))]
    return Corpus(
        train=tuple(train),
        validation=tuple(validation),
        train_weights=fields.pop("train_weights", ((0, len(train), 1.0),)),
        train_places=tuple(places[: len(train)]),
        validation_places=tuple(places[len(train) :]),
        report=DataReport(num_rows=len(places), max_seq_length=fields.pop("max_seq_length", 2048), **fields),
    )


def tokenize(conversations: list[Conversation], tokenizer: Tokenizer, **data: Any) -> TokenizedCorpus:
    return tokenize_corpus(corpus(conversations), tokenizer, DataConfig(**data))


def one(conversation: Conversation, tokenizer: Tokenizer, **data: Any) -> Row:
    (row,) = tokenize([conversation], tokenizer, **data).train
    return row


def read(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def labels(row: Row, tokenizer: Tokenizer) -> list[str]:
    """The text of every run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.loss_mask, [False]])))
    return [read(row.tokens[start:stop], tokenizer) for start, stop in edges.reshape(-1, 2)]


STOPS = {"chatml": EOS, "marked": EOS, "headers": "<|end|>", "reasoning": EOS, "tools": EOS, "strict": "</s>"}

CONTENT = st.lists(
    st.sampled_from(
        ["yes", "assistant", "\n", " ", "\n\n", "user: ", EOS, "e\u0301", "\u00e9", "\U0001f469\u200d\U0001f680"]
    )
    | st.sampled_from(["\u4f60\u597d", "\u0915\u094d\u0937", "\ufeff", "\u00a0", "[INST]", "</s>", "\t", "1."])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="".join(MARKS)), max_size=8),
    min_size=1,
    max_size=6,
).map("".join)
CONVERSATION = (
    st.lists(CONTENT.filter(lambda content: content.strip() != ""), min_size=2, max_size=6)
    .filter(lambda contents: len(contents) % 2 == 0)
    .map(lambda contents: talk(*contents))
)


@pytest.fixture(scope="session", params=["bare", "bos", "trim", "nfc", "wrapped"])
def any_tokenizer(request: pytest.FixtureRequest, make_tokenizer: Make) -> Tokenizer:
    if request.param == "wrapped":
        return TokenizerWrapper(make_tokenizer())
    options = {"bare": {}, "bos": {"adds_bos": True}, "trim": {"trim_offsets": True}, "nfc": {"nfc": True}}
    return make_tokenizer(**options[request.param])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=CONVERSATION, limit=st.integers(3, 60))
@pytest.mark.parametrize("name", STOPS)
def test_labels_are_the_assistant_turns_with_their_stop_tokens(
    any_tokenizer: Tokenizer, templates: dict[str, str], name: str, conversation: Conversation, limit: int
) -> None:
    said = [message.content for message in conversation.messages if message.role == "assistant"]
    data = {"chat_template": templates[name], "max_invalid_fraction": 0.0}
    row = one(conversation, any_tokenizer, **data)
    found = labels(row, any_tokenizer)
    assert len(found) == len(said)
    for label, content in zip(found, said, strict=True):
        stop = STOPS[name]
        assert label.endswith(stop)
        label = label.removesuffix(stop)
        expected = content.strip() if name in ("headers", "strict") else content
        if name == "reasoning":
            expected = content.lstrip("\n")
        if name == "strict":  # the template puts a space on either side
            label = label.strip()
        if getattr(any_tokenizer, "backend_tokenizer").normalizer is not None:  # noqa: B009
            label, expected = unicodedata.normalize("NFC", label), unicodedata.normalize("NFC", expected)
        assert label == expected

    prompt, reference = prompt_and_reference(row)
    start = len(prompt)
    assert row.loss_mask[start : start + len(reference)].all()
    assert not row.loss_mask[start - 1]
    assert read(reference, any_tokenizer).strip() == found[-1].removesuffix(STOPS[name]).strip()

    cut = tokenize([conversation, text("a b")], any_tokenizer, **data, overlong="truncate", max_seq_length=limit)
    if row.loss_mask[:limit].any():
        first = cut.train[0]
        np.testing.assert_array_equal(first.tokens, row.tokens[:limit])
        np.testing.assert_array_equal(first.loss_mask, row.loss_mask[:limit])
        assert first.reference[1] <= limit
    else:
        assert cut.report.num_untrainable >= 1
