from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mlx_distributed.config.schema import DataConfig
from mlx_distributed.data.batch import collate
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import MARKS, Conversation, Message
from mlx_distributed.data.sources import Corpus, DataReport
from mlx_distributed.data.tokenize import Row, TokenizedCorpus, prompt_and_reference, tokenize_corpus
from mlx_distributed.errors import DataError

Make = Callable[..., PreTrainedTokenizerFast]
EOS = "<|im_end|>"


def talk(*contents: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)))


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
        report=DataReport(**{"num_rows": len(places), "max_seq_length": 2048, **fields}),
    )


def tokenize(conversations: list[Conversation], tokenizer: Any, **data: Any) -> TokenizedCorpus:
    return tokenize_corpus(corpus(conversations), tokenizer, DataConfig(**data))


def one(conversation: Conversation, tokenizer: Any, **data: Any) -> Row:
    (row,) = tokenize([conversation], tokenizer, **data).train
    return row


def read(tokens: np.ndarray, tokenizer: Any) -> str:
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def labels(row: Row, tokenizer: Any) -> list[str]:
    """The text of every run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.loss_mask, [False]])))
    return [read(row.tokens[start:stop], tokenizer) for start, stop in edges.reshape(-1, 2)]


STOPS = {"chatml": EOS, "marked": EOS, "headers": "<|end|>", "reasoning": EOS, "tools": EOS, "strict": "</s>"}

CONTENT = st.lists(
    st.sampled_from(
        ["yes", "assistant", "\n", " ", "\n\n", "user: ", EOS, "e\u0301", "\u00e9", "\U0001f469\u200d\U0001f680"]
    )
    | st.sampled_from(["\u4f60\u597d", "\u0915\u094d\u0937", "\ufeff", "\u00a0", "[INST]", "</s>", "\t", "1."])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="".join(MARKS) + "\u2581"), max_size=8),
    min_size=1,
    max_size=6,
).map("".join)
CONVERSATION = (
    st.lists(CONTENT.filter(lambda content: content.strip() != ""), min_size=2, max_size=6)
    .filter(lambda contents: len(contents) % 2 == 0)
    .map(lambda contents: talk(*contents))
)


@pytest.fixture(scope="session", params=["bare", "bos", "trim", "nfc", "wrapped", "sentencepiece"])
def any_tokenizer(
    request: pytest.FixtureRequest, make_tokenizer: Make, sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> Any:
    if request.param == "sentencepiece":
        return sentencepiece_tokenizer
    if request.param == "wrapped":
        return TokenizerWrapper(make_tokenizer())
    options = {"bare": {}, "bos": {"adds_bos": True}, "trim": {"trim_offsets": True}, "nfc": {"nfc": True}}
    return make_tokenizer(**options[request.param])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=CONVERSATION, limit=st.integers(3, 60))
@pytest.mark.parametrize("name", STOPS)
def test_labels_are_the_assistant_turns_with_their_stop_tokens(
    any_tokenizer: Any, templates: dict[str, str], name: str, conversation: Conversation, limit: int
) -> None:
    said = [message.content for message in conversation.messages if message.role == "assistant"]
    # A tokenizer that puts white space behind a special token changes a text that holds one, which is refused.
    assume(any_tokenizer.unk_token is None or not any(EOS in content or "</s>" in content for content in said))
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
        if any_tokenizer.backend_tokenizer.normalizer is not None:
            label, expected = unicodedata.normalize("NFC", label), unicodedata.normalize("NFC", expected)
        if expected[0].isspace():  # one token may hold it and the white space that ends the header
            label, expected = label.lstrip(), expected.lstrip()
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


# --- what is trained on


@pytest.mark.parametrize(
    ("train_on", "eos", "expected"),
    [
        ("assistant", True, ["a<|im_end|>", "b<|im_end|>"]),
        ("assistant", False, ["a", "b"]),
        ("last", True, ["b<|im_end|>"]),
        ("last", False, ["b"]),
    ],
)
def test_which_turns_are_trained_on(make_tokenizer: Make, train_on: str, eos: bool, expected: list[str]) -> None:
    tokenizer = make_tokenizer()
    row = one(talk("q", "a", "r", "b"), tokenizer, train_on=train_on, train_on_eos=eos)
    assert labels(row, tokenizer) == expected
    assert read(prompt_and_reference(row)[1], tokenizer) == "b"


def test_white_space_that_ends_a_turn_is_of_the_turn(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    row = one(talk("q", "a \n", "q", "b "), tokenizer, train_on_eos=False)
    assert labels(row, tokenizer) == ["a \n", "b "]


def test_a_special_token_that_takes_white_space_from_the_turn_is_no_label(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|assistant|>", special=True, rstrip=True)], special_tokens=True)
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    assert labels(one(talk("q", " a"), tokenizer, chat_template=template), tokenizer) == ["a<|end|>"]


def test_all_means_every_token_but_the_first(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    row = one(talk("q", "a"), tokenizer, train_on="all")
    assert not row.loss_mask[0]
    assert row.loss_mask[1:].all()
    without = one(talk("q", "a"), tokenizer, train_on="all", train_on_eos=False)
    assert read(row.tokens[row.loss_mask & ~without.loss_mask], tokenizer) == EOS


def test_the_stop_token_is_trained_on_though_padding_is_the_same_token(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short, long = one(talk("q", "a"), tokenizer), one(talk("q", "a much longer answer"), tokenizer)
    batch = collate([short, long])
    tokens, loss_mask = batch.tokens, batch.loss_mask
    assert tokens.dtype == np.int32
    assert loss_mask.dtype == np.bool_
    assert tokens.shape == loss_mask.shape == (2, len(long.tokens))
    assert not loss_mask[0, len(short.tokens) :].any()
    for row, padded, mask in zip((short, long), tokens, loss_mask, strict=True):
        np.testing.assert_array_equal(padded[: len(row.tokens)], row.tokens)
        assert padded[mask][-1] == tokenizer.eos_token_id


def test_a_template_without_a_stop_token_gets_eos_at_the_end(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["plain"])
    row = one(talk("q", "a", "r", "b"), tokenizer)
    assert read(row.tokens, tokenizer) == "USER: q\nASSISTANT: a\nUSER: r\nASSISTANT: b\n<|im_end|>"
    assert [label.strip() for label in labels(row, tokenizer)] == ["a", "b\n<|im_end|>"]
    bare = one(talk("q", "a"), tokenizer, train_on_eos=False)
    assert read(bare.tokens, tokenizer) == "USER: q\nASSISTANT: a\n"


def test_the_token_that_begins_a_text_is_never_doubled(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["headers"], adds_bos=True)
    for row in tokenize([talk("q", "a"), raw("q", "a"), raw("<|begin|>q", "a"), text("t")], tokenizer).train:
        assert row.tokens.tolist().count(tokenizer.bos_token_id) == 1
        assert row.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in one(raw("q", "a"), make_tokenizer(adds_bos=False)).tokens


# --- raw conversations


def test_raw_pieces_are_tokenised_apart_and_end_with_eos(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    row = one(raw("th", "e answer"), tokenizer)
    pieces = [tokenizer(piece, add_special_tokens=False).input_ids for piece in ("th", "e answer")]
    assert row.tokens.tolist() == [*pieces[0], *pieces[1], tokenizer.eos_token_id]
    assert labels(row, tokenizer) == ["e answer<|im_end|>"]
    assert [read(part, tokenizer) for part in prompt_and_reference(row)] == ["th", "e answer"]
    without = one(raw("th", "e answer"), tokenizer, train_on_eos=False)
    assert without.tokens.tolist() == [*pieces[0], *pieces[1]]


def test_of_plain_text_everything_is_trained_on(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    row = one(text("once upon"), tokenizer)
    assert read(row.tokens, tokenizer) == "once upon<|im_end|>"
    assert row.loss_mask[1:].all()


def test_prompt_and_completion_need_no_template_but_use_one(make_tokenizer: Make) -> None:
    conversation = Conversation(talk("1 + 1 =", " 2").messages, raw_fallback=True)
    for template, expected in (
        (None, "1 + 1 = 2<|im_end|>"),
        ("{{ messages[0].content }}|{{ messages[1].content }}", None),
    ):
        tokenizer = make_tokenizer(template)
        assert read(one(conversation, tokenizer).tokens, tokenizer) == expected or "1 + 1 =| 2<|im_end|>"


def test_conversations_need_a_template(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template.*classic"):
        one(talk("q", "a"), make_tokenizer(None))
    assert one(talk("q", "a"), make_tokenizer(None), chat_template="{{ messages[1].content }}").loss_mask.any()


@pytest.mark.parametrize("conversation", [raw("q", "a"), talk("q", "a")])
def test_eos_is_needed_to_end_a_turn(
    make_tokenizer: Make, templates: dict[str, str], conversation: Conversation
) -> None:
    tokenizer = make_tokenizer(templates["plain"], eos_token=None)
    with pytest.raises(DataError, match="no eos token"):
        one(conversation, tokenizer)
    assert one(conversation, tokenizer, train_on_eos=False).loss_mask.any()


# --- rows that are refused or left out


def test_a_token_that_joins_the_turn_to_its_header_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}d{{ m.content }}<|end|>{% endfor %}")
    assert "dd" in tokenizer.get_vocab()
    with pytest.raises(DataError, match=r"1 of 1 rows are invalid .*do not decode to its text"):
        one(talk("q", "d answer"), tokenizer)
    assert labels(one(talk("q", "answer"), tokenizer), tokenizer) == ["answer<|end|>"]


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers

    inner = Inner(models.WordLevel({"<unk>": 0, "known": 1, "</s>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert one(raw("x", "known"), tokenizer).tokens.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="do not decode"):
        one(raw("known", "unknown"), tokenizer)


def test_a_stop_token_that_the_tokenizer_splits_is_refused(make_tokenizer: Make) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}stop{% endfor %}")
    tokenizer.add_tokens([AddedToken("stop", single_word=True)])
    with pytest.raises(DataError, match="is not one token"):
        one(talk("q", "a"), tokenizer)


def test_refused_rows_are_counted_against_the_limit(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["strict"])
    system = Conversation((Message("system", "s"), *talk("q", "a").messages))
    rows = [talk("q", "a")] * 8 + [system]
    with pytest.raises(DataError, match=r"2 of 10 rows are invalid \(1 empty output, 1 the chat template refuses"):
        tokenize_corpus(corpus(rows, num_rows=10, invalid={"empty output": 1}), tokenizer, DataConfig())
    done = tokenize(rows, tokenizer, max_invalid_fraction=0.2)
    assert len(done.train) == 8
    assert done.report.examples == (
        "rows.jsonl:9: the chat template refuses the conversation: only user and assistant",
    )


def test_a_tokenizer_without_offsets_is_refused() -> None:
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(DataError, match=r"tokenizer\.json"):
        one(talk("q", "a"), Slow())


LONG = talk("q", "answer " * 30)


def test_long_rows_are_dropped_and_counted_by_default(make_tokenizer: Make) -> None:
    rows = corpus([talk("q", "a"), LONG], [LONG, talk("q", "b")], max_seq_length=40)
    done = tokenize_corpus(rows, make_tokenizer(), DataConfig(max_seq_length=40))
    assert (len(done.train), len(done.validation)) == (1, 1)
    assert done.report.lines()[1:] == ["rows longer than 40 tokens, dropped: 2"]


def test_long_rows_are_cut_and_counted(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    rows = corpus([talk("q", "a"), LONG, talk("q " * 50, "a")], max_seq_length=40)
    done = tokenize_corpus(rows, tokenizer, DataConfig(max_seq_length=40, overlong="truncate"))
    assert [len(row.tokens) for row in done.train][1:] == [40]
    assert ("answer " * 30).startswith(labels(done.train[1], tokenizer)[0])
    assert done.report.lines()[1:] == [
        "rows longer than 40 tokens, truncated: 2",
        "rows without a trainable token, dropped: 1",
    ]


def test_a_long_row_may_be_an_error_that_names_it(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has \d+ tokens, more than data\.max_seq_length=40"):
        tokenize([talk("q", "a"), LONG], make_tokenizer(), max_seq_length=40, overlong="error")


def test_something_must_be_left_on_either_side(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(DataError, match=r"none of the 2 training rows is left: .* 2 have no trainable token"):
        tokenize([text("x"), text("y")], tokenizer, train_on_eos=False)
    rows = corpus([text("some")], [text("x")])
    with pytest.raises(DataError, match="none of the 1 validation rows"):
        tokenize_corpus(rows, tokenizer, DataConfig(train_on_eos=False))


def test_weights_follow_the_rows_that_are_left(make_tokenizer: Make) -> None:
    short = talk("q", "a")
    rows = corpus([short, LONG, short, LONG, short], train_weights=((0, 2, 1.0), (2, 4, 0.5), (4, 5, 2.0)))
    done = tokenize_corpus(rows, make_tokenizer(), DataConfig(max_seq_length=40))
    assert done.weights == ((0, 1, 1.0), (1, 2, 0.5), (2, 3, 2.0))
    assert done.report.num_train == 3


def test_the_digest_is_that_of_tokens_masks_and_sides(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    a, b = talk("q", "a"), talk("q", "b")

    def digests(train: list[Conversation], validation: list[Conversation], **data: Any) -> tuple[str, str]:
        done = tokenize_corpus(corpus(train, validation), tokenizer, DataConfig(**data))
        return done.train_digest, done.validation_digest

    assert digests([a, b], []) == digests([a, b], [])
    others = [digests([b, a], []), digests([a], [b]), digests([a, b], [], train_on_eos=False), digests([a, a], [])]
    assert len({digests([a, b], [])[0], *(train for train, _ in others)}) == 5
    assert digests([a], [b])[0] == digests([a], [a])[0]
    assert digests([a], [b])[1] != digests([a], [a])[1]


def test_more_conversations_than_are_tokenised_at_once(make_tokenizer: Make) -> None:
    rows = [conversation for n in range(400) for conversation in (talk("q", f"a {n}"), text(f"b {n}"))]
    tokenizer = make_tokenizer()
    done = tokenize(rows, tokenizer)
    said = [read(prompt_and_reference(row)[1], tokenizer) for row in done.train]
    assert said == [conversation.messages[-1].content for conversation in rows]
