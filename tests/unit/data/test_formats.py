from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.config.schema import DataConfig, SourceConfig
from mlx_distributed.data.formats import OPTIONAL, REQUIRED, ROLES, ConcreteFormat, detect_format, normalise
from mlx_distributed.data.messages import Conversation, Invalid, Message, ToolCall
from mlx_distributed.errors import DataError

FORMATS: tuple[ConcreteFormat, ...] = tuple(REQUIRED)


def read(row: object, format: ConcreteFormat, data: DataConfig | None = None, **source: Any) -> Conversation | Invalid:
    return normalise(row, format, SourceConfig(path="rows.json", **source), data or DataConfig())


def turns_of(row: object, format: ConcreteFormat = "sharegpt", **options: Any) -> list[tuple[str, str]]:
    found = read(row, format, **options)
    assert isinstance(found, Conversation), found
    return [(message.role, message.content) for message in found.messages]


def reason(row: object, format: ConcreteFormat = "sharegpt", **options: Any) -> str:
    found = read(row, format, **options)
    assert isinstance(found, Invalid), found
    return found.reason


def chat(*turns: str, **columns: Any) -> dict[str, Any]:
    """A ShareGPT row from `role: text` lines."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **columns}


# --- Alpaca


@pytest.mark.parametrize("none", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_missing_null_and_blank_inputs_are_none(none: dict[str, Any]) -> None:
    row = {"instruction": "Say hi.", "output": "Hi", **none}
    assert turns_of(row, "alpaca") == [("user", "Say hi."), ("assistant", "Hi")]


def test_the_input_follows_the_instruction_on_a_line_of_its_own() -> None:
    assert turns_of({"instruction": "Add.", "input": "1, 2", "output": "3"}, "alpaca")[0] == ("user", "Add.\n1, 2")


def test_an_input_alone_is_the_instruction() -> None:
    assert turns_of({"instruction": None, "input": "1 + 2?", "output": "3"}, "alpaca")[0] == ("user", "1 + 2?")


def test_system_and_history_come_before_the_instruction() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    expected = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert turns_of(row, "alpaca") == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"output": None}, "empty output"),
        ({"output": " "}, "empty output"),
        ({"output": 3}, "output is not text"),
        ({"instruction": ""}, "empty instruction"),
        ({"system": ["s"]}, "system is not text"),
        ({"history": "x"}, "history is not a list of [user, assistant] pairs"),
        ({"history": [["a"]]}, "history is not a list of [user, assistant] pairs"),
        ({"history": [["a", None]]}, "history is not a list of [user, assistant] pairs"),
        ({"history": [["a", " "]]}, "empty turn in history"),
    ],
)
def test_alpaca_rows_that_are_refused(change: dict[str, Any], why: str) -> None:
    assert reason({"instruction": "Say hi.", "output": "Hi", **change}, "alpaca") == why


def test_classic_prompts_are_raw_and_end_right_after_the_response_header() -> None:
    data = DataConfig(alpaca_style="classic")
    found = read({"instruction": "Add {x}.", "input": "1", "output": "3"}, "alpaca", data)
    assert isinstance(found, Conversation)
    assert found.raw
    prompt, answer = (message.content for message in found.messages)
    assert prompt.endswith("\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1\n\n### Response:")
    assert "paired with an input" in prompt
    assert answer == "3"
    (_, plain), _ = turns_of({"instruction": "Say hi.", "output": "Hi"}, "alpaca", data=data)
    assert plain.endswith("\n\n### Instruction:\nSay hi.\n\n### Response:")
    assert "input" not in plain


@pytest.mark.parametrize("extra", [{"system": "s"}, {"history": [["a", "b"]]}])
def test_the_classic_prompt_has_no_place_for_system_and_history(extra: dict[str, Any]) -> None:
    row = {"instruction": "a", "output": "b", **extra}
    assert "no place" in reason(row, "alpaca", data=DataConfig(alpaca_style="classic"))


# --- ShareGPT and messages


@pytest.mark.parametrize("name", [name for name in ROLES if name != "function_call"])
def test_role_names_are_known_in_any_case(name: str) -> None:
    opening = {"user": [], "system": [], "assistant": ["human: q"], "tool": ["human: q", "gpt: a"]}[ROLES[name]]
    rows = chat(*opening, f"{name.upper()}: x", "human: q2", "gpt: a2")
    assert (ROLES[name], "x") in [(role, text.split("\n\n")[0]) for role, text in turns_of(rows)]


def test_roles_of_the_configuration_win() -> None:
    row = chat("Me: hi", "gpt: hello")
    assert turns_of(row, roles={"me": "user"}) == [("user", "hi"), ("assistant", "hello")]
    assert reason(row) == "unknown role"
    call = chat("human: hi", 'act: {"name": "f", "arguments": {}}')
    found = read(call, "sharegpt", roles={"act": "function_call"})
    assert isinstance(found, Conversation)
    assert found.messages[1].tool_calls == (ToolCall("f", {}),)


def test_both_pairs_of_keys_are_read_in_both_formats() -> None:
    turns = [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]
    expected = [("user", "q"), ("assistant", "a")]
    assert turns_of({"conversations": turns}) == expected
    assert turns_of({"messages": turns}, "messages") == expected


def test_columns_may_have_other_names_also_inside_a_turn() -> None:
    row = {"dialog": [{"speaker": "user", "said": "q"}, {"speaker": "bot", "said": "a"}], "sys": "s"}
    columns = {"conversations": "dialog", "system": "sys", "role": "speaker", "content": "said"}
    assert turns_of(row, columns=columns) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_the_system_text_is_the_first_message_or_a_column_and_blank_is_none() -> None:
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert turns_of(chat("system: s", "human: q", "gpt: a")) == expected
    assert turns_of(chat("human: q", "gpt: a", system="s")) == expected
    assert turns_of(chat("system:  ", "human: q", "gpt: a", system=" ")) == expected[1:]
    assert turns_of(chat("system: t", "human: q", "gpt: a", system="s"))[0] == ("system", "s\n\nt")
    assert reason(chat("human: q", "system: s", "gpt: a")) == "system text after the first turn"


def test_leading_answers_and_trailing_questions_are_dropped() -> None:
    row = chat("gpt: hello", "tool: x", "human: q", "gpt: a", "human: q2", "tool: ")
    assert turns_of(row) == [("user", "q"), ("assistant", "a")]
    assert reason(chat("gpt: hello", "human: q")) == "no assistant turn after a user turn"
    assert reason(chat()) == "no assistant turn after a user turn"


def test_neighbours_of_one_role_are_merged_or_refused() -> None:
    row = chat("human: a", "human: b", "gpt: c", "gpt: d")
    assert turns_of(row) == [("user", "a\n\nb"), ("assistant", "c\n\nd")]
    assert reason(row, data=DataConfig(merge_turns=False)) == "neighbouring turns of one role"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (3, "row is not an object"),
        (["a"], "row is not an object"),
        ({}, "conversations is not a list"),
        ({"conversations": "x"}, "conversations is not a list"),
        ({"conversations": ["x"]}, "turn is not an object"),
        ({"conversations": [{"value": "x"}]}, "turn without a role"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "turn without a role"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": 1}]}, "content is not text"),
        ({"conversations": [{"from": "human", "value": [{"type": "image"}]}]}, "content has a part that is not text"),
        (chat("human:  ", "gpt: a"), "empty user turn"),
        (chat("human: q", "gpt:  "), "empty assistant turn"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "empty assistant turn"),
        (chat("human: q", "gpt: a", system=1), "system is not text"),
        (chat("human: q", "gpt: a", tools="{"), "tools are not a JSON list of functions"),
        (chat("human: q", "gpt: a", tools=[1]), "tools are not a JSON list of functions"),
        (chat("human: q", "gpt: a", tools=[{"name": {1}}]), "tools or function calls are not JSON"),
        (chat("human: q", "function_call: f(1)"), "function call is not JSON with a name and arguments"),
        (chat("human: q", "function_call: []"), "function call is not JSON with a name and arguments"),
        (chat("human: q", 'function_call: {"name": ""}'), "function call is not JSON with a name and arguments"),
        (chat("human: q", 'function_call: {"name": "f", "arguments": "x"}'),
         "function call is not JSON with a name and arguments"),
        (chat("human: q", 'function_call: {"name": "f"}', "gpt: a"),
         "assistant text after a function call without its result"),
        (chat("human: \ud800", "gpt: a"), "text is not valid Unicode"),
        (chat("human: \ufdd2", "gpt: a"), "text holds a character that Unicode keeps for internal use"),
    ],
)  # fmt: skip
def test_conversations_that_are_refused(row: object, why: str) -> None:
    assert reason(row) == why


def test_the_detail_names_the_turn() -> None:
    assert str(read(chat("human: q", "alien: x"), "sharegpt")) == "unknown role: 'alien' (turn 2)"


def test_function_calls_and_results() -> None:
    tools = [{"name": "f", "parameters": {}}]
    row = chat(
        "human: q",
        "gpt: Let me look.",
        'function_call: {"name": "f", "arguments": {"x": 1}}',
        'function_call: {"name": "g", "arguments": "{\\"y\\": 2}"}',
        "observation: one",
        "observation: two",
        "gpt: a",
        tools=json.dumps(tools),
    )
    found = read(row, "sharegpt")
    assert isinstance(found, Conversation)
    assert found.tools == ({"type": "function", "function": tools[0]},)
    assert found.messages == (
        Message("user", "q"),
        Message("assistant", "Let me look.", (ToolCall("f", {"x": 1}), ToolCall("g", {"y": 2}))),
        Message("tool", "one"),
        Message("tool", "two"),
        Message("assistant", "a"),
    )


@pytest.mark.parametrize("none", [None, "", " ", [], "[]"])
def test_no_tools(none: object) -> None:
    found = read(chat("human: q", "gpt: a", tools=none), "sharegpt")
    assert isinstance(found, Conversation)
    assert found.tools == ()


def test_openai_messages_with_parts_and_calls() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    row: dict[str, Any] = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "content": "r", "tool_call_id": "c1"},
            {"role": "assistant", "content": "z", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    found = read(row, "messages")
    assert isinstance(found, Conversation)
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
    assert found.messages[1:4] == (
        Message("user", "ab"),
        Message("assistant", "", (ToolCall("f", {"x": 1}, "c1"),)),
        Message("tool", "r", tool_call_id="c1"),
    )
    row["messages"][2]["tool_calls"] = [7]
    assert reason(row, "messages") == "function call is not JSON with a name and arguments"


# --- prompt and completion, text


def test_prompt_and_completion() -> None:
    found = read({"prompt": "1 + 1 =", "completion": " 2"}, "prompt_completion")
    assert found == Conversation((Message("user", "1 + 1 ="), Message("assistant", " 2")), raw_fallback=True)
    assert reason({"prompt": "", "completion": "x"}, "prompt_completion") == "empty prompt"
    assert reason({"prompt": "x", "completion": None}, "prompt_completion") == "empty completion"


def test_text_is_raw_and_said_by_the_model() -> None:
    assert read({"text": "once"}, "text") == Conversation((Message("assistant", "once"),), raw=True)
    assert reason({"text": " "}, "text") == "empty text"


# --- all of them

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROLE = st.sampled_from([*ROLES, "alien", "", None, 1])
CONTENT = st.sampled_from(["q", "", None, '{"name": "f", "arguments": {}}', "[]"]) | JSON
TURN = st.fixed_dictionaries(
    {}, optional={"from": ROLE, "role": ROLE, "value": CONTENT, "content": CONTENT, "tool_calls": JSON}
)
COLUMN = st.sampled_from(["x", "", None]) | st.lists(TURN | JSON, max_size=4) | JSON
ROW = JSON | st.dictionaries(
    st.sampled_from([column for format in FORMATS for column in REQUIRED[format] + OPTIONAL[format]]), COLUMN
)


@settings(max_examples=300, deadline=None)
@given(ROW, st.sampled_from(FORMATS), st.booleans(), st.sampled_from(["chat", "classic"]))
def test_no_value_raises_and_what_is_accepted_can_be_trained_on(
    row: object, format: ConcreteFormat, merge: bool, style: Any
) -> None:
    found = read(row, format, DataConfig(merge_turns=merge, alpaca_style=style))
    if isinstance(found, Invalid):
        assert found.reason
        return
    roles = [message.role for message in found.messages]
    assert roles[-1] == "assistant"
    assert "system" not in roles[1:]
    assert format == "text" or roles[roles[0] == "system"] == "user"
    assert all(message.content.strip() or message.tool_calls for message in found.messages)
    assert all(a != b or a == "tool" for a, b in pairwise(roles))


def test_deeply_nested_text_is_refused() -> None:
    assert reason(chat("human: q", "gpt: a", tools="[" * 100_000)) == "tools are not a JSON list of functions"


# --- detection


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_known_by_its_columns(format: ConcreteFormat) -> None:
    row = dict.fromkeys(REQUIRED[format], "x")
    assert detect_format([row], SourceConfig()) == format


def test_the_format_is_that_of_most_rows_not_of_the_first() -> None:
    rows: list[object] = [{"text": "x"}, 3, {"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}]
    assert detect_format(rows, SourceConfig()) == "alpaca"


def test_columns_that_are_null_do_not_count_and_renamed_ones_do() -> None:
    rows = [{"messages": None, "question": "a", "answer": "b"}]
    source = SourceConfig(columns={"instruction": "question", "output": "answer"})
    assert detect_format(rows, source) == "alpaca"


def test_a_file_that_fits_nothing_is_refused_with_what_was_looked_for() -> None:
    source = SourceConfig(path="some.json")
    with pytest.raises(DataError, match=r"some.json has the columns a, b, .*instruction and output \(alpaca\)"):
        detect_format([{"a": 1}, {"b": 2}], source)
    with pytest.raises(DataError, match="holds no objects"):
        detect_format([3], source)
