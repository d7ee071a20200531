from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_distributed.data.messages import Conversation, Invalid, Message, ToolCall
from mlx_distributed.data.spans import Layout, lay_out
from mlx_distributed.data.template import ChatTemplate

Make = Callable[..., PreTrainedTokenizerFast]

CALL = ToolCall("find", {"what": "rice"})
CALL_TEXT = '<tool_call>\n{"name": "find", "arguments": {"what": "rice"}}\n</tool_call>'
TOOLS = ({"type": "function", "function": {"name": "find"}},)
THOUGHT = "<think>\nhm\n</think>\n\n4"


Said = Callable[..., list[tuple[str, str]]]


def talk(*contents: str | ToolCall | tuple[str, ToolCall]) -> Conversation:
    """User and assistant in turn; what follows a function call is its result."""
    messages: list[Message] = []
    for content in contents:
        if messages and messages[-1].tool_calls:
            messages.append(Message("tool", str(content)))
        elif not messages or messages[-1].role == "assistant":
            messages.append(Message("user", str(content)))
        elif isinstance(content, str):
            messages.append(Message("assistant", content))
        else:
            text, call = content if isinstance(content, tuple) else ("", content)
            messages.append(Message("assistant", text, (call,)))
    return Conversation(tuple(messages), TOOLS if any(message.tool_calls for message in messages) else ())


@pytest.fixture
def laid_out(make_tokenizer: Make, templates: dict[str, str]) -> Callable[..., Layout | Invalid]:
    def lay(template: str, *contents: str | ToolCall | tuple[str, ToolCall]) -> Layout | Invalid:
        return lay_out(talk(*contents), ChatTemplate(make_tokenizer(), templates.get(template, template)))

    return lay


@pytest.fixture
def said(laid_out: Callable[..., Layout | Invalid]) -> Said:
    """The text and the stop token of every turn that `lay_out` finds."""

    def find(template: str, *contents: str | ToolCall | tuple[str, ToolCall]) -> list[tuple[str, str]]:
        layout = laid_out(template, *contents)
        assert isinstance(layout, Layout), layout
        return [
            (layout.text[span.start : span.end], layout.text[span.end : span.stop].strip()) for span in layout.spans
        ]

    return find


@pytest.mark.parametrize(
    ("template", "stop", "last"),
    [
        ("chatml", "<|im_end|>", "<|im_end|>"),
        ("marked", "<|im_end|>", "<|im_end|>"),
        ("headers", "<|end|>", "<|end|>"),
        ("reasoning", "<|im_end|>", "<|im_end|>"),
        ("tools", "<|im_end|>", "<|im_end|>"),
        ("strict", "</s>", "</s>"),
        ("plain", "", ""),
    ],
)
def test_every_turn_and_its_stop_token(said: Said, template: str, stop: str, last: str) -> None:
    # Turns that repeat each other and the user, so that looking for their text alone would find the wrong place.
    assert said(template, "yes", "yes", "yes", "no yes", "yes", "yes") == [
        ("yes", stop),
        ("no yes", stop),
        ("yes", last),
    ]


@pytest.mark.parametrize("template", ["chatml", "headers", "marked"])
def test_white_space_is_as_the_template_leaves_it(said: Said, template: str) -> None:
    first, second = (text for text, _ in said(template, "q", "\n  a \n\n", "q", " b\t"))
    if template == "headers":
        assert (first, second) == ("a", "b")
    else:
        assert (first.rstrip(), second.rstrip()) == ("\n  a", " b")


def test_reasoning_is_found_where_the_template_keeps_it(said: Said) -> None:
    end = "<|im_end|>"
    assert said("reasoning", "q", THOUGHT) == [(THOUGHT, end)]
    assert said("reasoning", "q", THOUGHT, "q", THOUGHT) == [("4", end), (THOUGHT, end)]
    assert said("reasoning", "q", THOUGHT, "q", "5", "q", THOUGHT) == [("4", end), ("5", end), (THOUGHT, end)]
    # Set otherwise than the template sets it: found by rendering with and without the turn.
    assert said("reasoning", "q", "<think>hm</think>4") == [(THOUGHT, end)]
    assert said("chatml", "q", THOUGHT, "q", THOUGHT) == [(THOUGHT, end), (THOUGHT, end)]


def test_function_calls(said: Said) -> None:
    end = "<|im_end|>"
    assert said("reasoning", "q", CALL, "r", "a") == [(CALL_TEXT, end), ("a", end)]
    assert said("reasoning", "q", ("Look:", CALL), "r", "a", "q", CALL) == [
        ("Look:\n" + CALL_TEXT, end),
        ("a", end),
        (CALL_TEXT, end),
    ]
    assert said("tools", "q", CALL, "r", THOUGHT) == [("\n" + CALL_TEXT, end), (THOUGHT, end)]
    call = '[{"name": "find", "arguments": {"what": "rice"}}]'
    assert said("strict", "q", CALL, "r", "a", "q", "b", "q", CALL, "r", "c") == [
        (" [CALLS] " + call, "</s>"),
        (" a ", "</s>"),
        (" b ", "</s>"),
        (" [CALLS] " + call, "</s>"),
        (" c ", "</s>"),
    ]


def test_a_stop_token_in_the_data_does_not_end_the_turn(said: Said) -> None:
    assert said("chatml", "q", "a<|im_end|>b", "q", "c<|im_end|>") == [
        ("a<|im_end|>b", "<|im_end|>"),
        ("c<|im_end|>", "<|im_end|>"),
    ]
    assert said("marked", "q", "c<|im_end|>") == [("c<|im_end|>", "<|im_end|>")]


def test_a_template_that_shows_a_part_of_the_calls_is_refused(make_tokenizer: Make) -> None:
    first = "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ (m.tool_calls | first).function | tojson }}"
    template = first + "{% endif %}<|end|>{% endfor %}"
    calls = (CALL, ToolCall("find_all", {}))
    message = Message("assistant", "", calls)
    conversation = Conversation((Message("user", "q"), message, Message("tool", "r"), Message("assistant", "a")), TOOLS)
    assert "does not show a function call" in str(lay_out(conversation, ChatTemplate(make_tokenizer(), template)))


def test_markers_without_the_stop_token_and_around_more_than_the_text(said: Said) -> None:
    bare = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    assert said(bare + "<|end|>{% else %}{{ m.content }}{% endif %}{% endfor %}", "q", "a") == [("a", "<|end|>")]
    more = bare.replace("{{ m.content }}", "<think></think>{{ m.content }}<|end|>\n")
    assert said(more + "{% else %}{{ m.content }}{% endif %}{% endfor %}", "q", "a") == [
        ("<think></think>a", "<|end|>")
    ]


def test_markers_that_mark_something_else_are_not_used(said: Said) -> None:
    wrong = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% generation %}other{% endgeneration %}"
    assert said(wrong, "q", "a") == [("a", "<|end|>")]


@pytest.mark.parametrize(
    ("template", "contents", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", ("q", "a"), "refuses the conversation: roles must alternate"),
        ("chatml", ("q", CALL), "does not show a function call: message 2"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ("q", "abc"), "changes the text"),
        ("{{ messages[0].content }}", ("q", "a"), "changes the text of an assistant turn: message 2"),
        ("{% for m in messages %}{{ m.content[2:] }}<|end|>{% endfor %}", ("qqq", "a long one"), "changes the text"),
        ("strict", ("q", ("Look:", CALL), "r", "a"), "does not show a function call and the text beside it: message 2"),
        ("reasoning", ("q", "<think>a</think>b</think>c"), "changes the text of an assistant turn: message 2"),
        # The first turn is nothing but a thought, and so is empty; the second says the same, and is found for it.
        ("reasoning", ("q", "hm</think>", "q", "hm</think>"), "changes the text of an assistant turn"),
        ("{% if messages | length < 3 %}{{ raise_exception('short') }}{% endif %}{{ messages[-1].content | upper }}",
         ("q", "a", "q", "b"), "changes the text"),
    ],
)  # fmt: skip
def test_conversations_whose_turns_cannot_be_found(
    laid_out: Callable[..., Layout | Invalid], template: str, contents: tuple[str, ...], why: str
) -> None:
    assert why in str(laid_out(template, *contents))
