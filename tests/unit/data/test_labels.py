"""Labels, decoded, are what the assistant says and the stop token: in eight families of chat templates."""

from __future__ import annotations

import re
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from chat_families import FAMILIES, Family, Turns, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_distributed.config.schema import DataConfig
from mlx_distributed.data.batch import pack
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import MARKS, Conversation, Message, ToolCall, to_dicts
from mlx_distributed.data.sources import Corpus, DataReport
from mlx_distributed.data.tokenize import Row, TokenizedCorpus, tokenize_corpus
from mlx_distributed.errors import DataError

TEXTS = (
    "The cook asked for water, rice and a little salt.",
    "1, 2, 3; user: assistant: USER ASSISTANT",
    "a\n\n b\n",
) * 3
TOOLS = ({"type": "function", "function": {"name": "find", "parameters": {}}},)
OWN = sorted({token for family in FAMILIES.values() for token in (family.stop, *family.special)})
PIECES = (
    *("yes", " ", "\n", "\n\n", "\t", "user", "assistant", "\nUSER: ", " ASSISTANT:", "<|assistant|>\n", ".", "7"),
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "\ufeff",
        "\u00a0",
        "e\u0301",
        "\u4f60\u597d",
        "\U0001f469\u200d\U0001f680",
    ),
    *("yes<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>", '{"name": "find", "arguments": {"x": 1}}', "{{ x }}"),
)
NOT_BLANK = st.lists(
    st.sampled_from(PIECES)
    | st.sampled_from(OWN)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="".join(MARKS)), max_size=6),
    min_size=1,
    max_size=5,
).map("".join).filter(lambda content: content.replace("</think>", "").strip() != "")  # fmt: skip
THOUGHT = st.builds(
    lambda thought, answer: f"<think>\n{thought}\n</think>\n\n{answer}", st.sampled_from(["", "hm\n\nwell"]), NOT_BLANK
)
ARGUMENTS = st.dictionaries(st.sampled_from(["x", "of what"]), NOT_BLANK)
CALLS = st.lists(st.builds(ToolCall, st.sampled_from(["find", "find_all"]), ARGUMENTS), min_size=1, max_size=2).map(
    tuple
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", draw(NOT_BLANK))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(NOT_BLANK)))
        if draw(st.integers(0, 3)) == 0:
            calls = draw(CALLS)
            messages.append(Message("assistant", draw(st.sampled_from(["", "", "Look:"])), calls))
            messages += [Message("tool", draw(NOT_BLANK)) for _ in calls]
        messages.append(Message("assistant", draw(NOT_BLANK | THOUGHT)))
    if draw(st.integers(0, 5)) == 0:
        messages[-1] = Message("assistant", "", draw(CALLS))
    tools = TOOLS if any(message.tool_calls for message in messages) else ()
    return Conversation(tuple(messages), tools)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(FAMILIES[name], TEXTS, 400)


def tokenize(name: str, *rows: Conversation, **data: Any) -> TokenizedCorpus:
    places = tuple(Place("rows.jsonl", line) for line in range(1, len(rows) + 1))
    report = DataReport(num_rows=len(rows), max_seq_length=4096)
    corpus = Corpus(rows, (), ((0, len(rows), 1.0),), places, (), report)
    settings = DataConfig(**{"max_invalid_fraction": 0.0, "max_seq_length": 4096, **data})
    return tokenize_corpus(corpus, tokenizer_of(name), settings)


def decode(name: str, tokens: np.ndarray) -> str:
    text: str = tokenizer_of(name).decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def labels(name: str, row: Row) -> list[str]:
    """The text of every run of targets; white space before it may be of the same token as what the header ends with."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.loss_mask, [False]])))
    return [decode(name, row.tokens[start:stop]).lstrip() for start, stop in edges.reshape(-1, 2)]


def spoken(family: Family, conversation: Conversation) -> Turns:
    """The turns as far as the tokenizer can say them; None where it cannot, or the template has no place for them."""
    turns = family.turns(conversation)
    if turns is None or not family.swallows:
        return turns and [turn.lstrip() for turn in turns]
    token = "|".join(map(re.escape, (family.stop, *family.special)))
    turns = [re.sub(rf"({token})\s+$", r"\1", turn.lstrip()) for turn in turns]
    return None if any(re.search(rf"({token})\s", turn) for turn in turns) else turns


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations(), limit=st.integers(2, 200))
def test_labels_are_what_the_assistant_says(name: str, conversation: Conversation, limit: int) -> None:
    family = FAMILIES[name]
    said = spoken(family, conversation)
    if said is None:
        with pytest.raises(DataError, match=r"1 (the chat template|the labels of an assistant turn do not decode)"):
            tokenize(name, conversation)
        return
    (row,) = tokenize(name, conversation).train
    assert labels(name, row) == [turn + family.stop for turn in said]
    assert labels(name, *tokenize(name, conversation, train_on_eos=False).train) == said
    assert labels(name, *tokenize(name, conversation, train_on="last").train) == [said[-1] + family.stop]
    (whole,) = tokenize(name, conversation, train_on="all").train
    assert whole.loss_mask.tolist() == [False] + [True] * (len(row.tokens) - 1)

    cut = tokenize(name, conversation, conversation, train_on="all", overlong="truncate", max_seq_length=limit).train[0]
    np.testing.assert_array_equal(cut.tokens, row.tokens[:limit])
    assert cut.num_cut == max(len(row.tokens) - limit, 0)
    if row.loss_mask[:limit].any():
        (cut,) = tokenize(name, conversation, overlong="truncate", max_seq_length=limit).train
        np.testing.assert_array_equal(cut.loss_mask, row.loss_mask[:limit])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations())
def test_the_model_is_asked_as_it_was_taught(name: str, conversation: Conversation) -> None:
    """What stands before the last turn is the prompt that transformers makes of the messages before it."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    said = spoken(family, conversation)
    if said is None:
        return
    (row,) = tokenize(name, conversation, train_on="last").train
    # A turn without a thought is taught as what is asked for with thinking off.
    thinks = said[-1].startswith("<think>\n")
    prompt = tokenizer.apply_chat_template(
        to_dicts(conversation.messages[:-1]),
        tools=list(conversation.tools) or None,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=thinks,
    )
    before = decode(name, row.tokens[: int(row.loss_mask.argmax())])
    if family.swallows:
        before, prompt = (re.sub(r"\s", "", text) for text in (before, prompt))
    assert before.rstrip() == prompt.rstrip()


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(several=st.lists(conversations(), min_size=2, max_size=4), multiple=st.sampled_from([1, 32]))
def test_a_packed_batch_has_the_labels_of_its_rows(name: str, several: list[Conversation], multiple: int) -> None:
    family = FAMILIES[name]
    said = [(conversation, turns) for conversation in several if (turns := spoken(family, conversation)) is not None]
    if not said:
        return
    batch = pack(tokenize(name, *(conversation for conversation, _ in said)).train, multiple)
    assert batch.groups is not None
    lengths = [length for group in batch.groups for length in group]
    edges = [*accumulate(lengths[:-1], initial=0), batch.tokens.shape[1]]
    rows = [Row(batch.tokens[0, start:stop], batch.loss_mask[0, start:stop]) for start, stop in pairwise(edges)]
    assert not any(row.loss_mask[0] for row in rows), "the last token of a row would be taught the first of the next"
    expected = [[turn + family.stop for turn in turns] for _, turns in said]
    assert sorted(labels(name, row) for row in rows) == sorted(expected)
