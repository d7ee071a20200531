from __future__ import annotations

from mlx_distributed.data.messages import Invalid, Message, ToolCall, to_dicts


def test_calls_without_an_id_are_numbered_and_their_results_refer_to_them_in_order() -> None:
    add, ask = ToolCall("add", {"a": 1}), ToolCall("ask", {})
    turns = (
        Message("user", "go"),
        Message("assistant", "", (add, ask)),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "again", (add,)),
        Message("tool", "3"),
    )
    user, calls, first, second, again, third = to_dicts(turns)
    assert user == {"role": "user", "content": "go"}
    assert [call["id"] for call in calls["tool_calls"]] == ["call00001", "call00002"]
    assert calls["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert (first["tool_call_id"], first["name"]) == ("call00001", "add")
    assert (second["tool_call_id"], second["name"]) == ("call00002", "ask")
    assert (again["content"], again["tool_calls"][0]["id"], third["tool_call_id"]) == (
        "again",
        "call00003",
        "call00003",
    )


def test_ids_in_the_data_are_kept() -> None:
    calls = (ToolCall("add", {}, "x"), ToolCall("ask", {}, "y"))
    turns = (Message("assistant", "", calls), Message("tool", "2", tool_call_id="y"), Message("tool", "1"))
    _, second, first = to_dicts(turns)
    assert (second["tool_call_id"], second["name"]) == ("y", "ask")
    assert (first["tool_call_id"], first["name"]) == ("x", "add")


def test_a_result_without_a_call_has_no_id() -> None:
    assert to_dicts([Message("tool", "1")]) == [{"role": "tool", "content": "1"}]


def test_a_refusal_reads_with_its_detail() -> None:
    assert str(Invalid("unknown role", "'x'")) == "unknown role: 'x'"
    assert str(Invalid("empty output")) == "empty output"


def test_a_refusal_does_not_steer_the_terminal() -> None:
    assert str(Invalid("the chat template refuses the conversation", "\x1b[2J\n")).endswith("conversation: ?[2J?")
