"""Rows of the known data formats -> conversations, and which format a file has.

The rules for Alpaca follow the original (two prompts, chosen by whether there is an input) with blank inputs counted as
none; those for ShareGPT accept the role names in use and refuse what cannot be trained on without guessing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from mlx_distributed.config.schema import DataConfig, SourceConfig
from mlx_distributed.data.messages import MARKS, Conversation, Invalid, Message, Role, ToolCall
from mlx_distributed.errors import DataError

ConcreteFormat = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text"]

REQUIRED: dict[ConcreteFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Columns by which a format is known. A row that fits several is of the first."""

OPTIONAL: dict[ConcreteFormat, tuple[str, ...]] = {
    "messages": ("system", "tools", "role", "content"),
    "sharegpt": ("system", "tools", "role", "content"),
    "prompt_completion": (),
    "alpaca": ("input", "system", "history"),
    "text": (),
}
"""The other columns that are read; `role` and `content` are the keys inside a turn."""

ROLES: dict[str, Role | Literal["function_call"]] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "function_call",
}

CLASSIC = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
CLASSIC_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def normalise(row: object, format: ConcreteFormat, source: SourceConfig, data: DataConfig) -> Conversation | Invalid:
    """The conversation that a row holds, or why it is refused. Takes any JSON value and never raises."""
    if not isinstance(row, dict):
        return Invalid("row is not an object", type(row).__name__)
    # From here on a row has our column names only; the keys inside a turn are looked up where turns are read.
    named = {ours: row.get(source.columns.get(ours, ours)) for ours in REQUIRED[format] + OPTIONAL[format]}
    if format == "alpaca":
        found = _alpaca(named, data)
    elif format in ("sharegpt", "messages"):
        found = _turns(named, REQUIRED[format][0], source, data)
    elif format == "prompt_completion":
        found = _prompt_completion(named)
    else:
        text = _text(named, "text", required=True)
        found = text if isinstance(text, Invalid) else Conversation((Message("assistant", text),), raw=True)
    return found if isinstance(found, Invalid) else _check_characters(found)


def fits(row: object, source: SourceConfig) -> ConcreteFormat | None:
    """The first format whose columns the row has."""
    if isinstance(row, dict):
        for format, columns in REQUIRED.items():
            if all(row.get(source.columns.get(column, column)) is not None for column in columns):
                return format
    return None


def detect_format(rows: Iterable[object], source: SourceConfig) -> ConcreteFormat:
    """The format that most rows of a source fit.

    Raises:
        DataError: no row fits any.
    """
    rows = list(rows)
    counts = Counter(fits(row, source) for row in rows)
    best = max(REQUIRED, key=lambda format: counts[format])
    if counts[best]:
        return best
    seen = sorted({str(key) for row in rows[:1000] if isinstance(row, dict) for key in row})
    wanted = "; ".join(f"{' and '.join(columns)} ({format})" for format, columns in REQUIRED.items())
    has = f"has the columns {', '.join(seen[:20])}" if seen else "holds no objects with columns"
    raise DataError(
        f"{source.path} {has}, which fits no known format; looked for {wanted}. "
        "Name its columns under `columns`, as in {instruction: question, output: answer}"
    )


def _text(row: dict[str, Any], column: str, *, required: bool = False) -> str | Invalid:
    """The text in a column; missing, null and blank all are "", or refused where it is required."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        return Invalid(f"{column} is not text", type(value).__name__)
    if value is None or not value.strip():
        return Invalid(f"empty {column}") if required else ""
    return value


def _alpaca(row: dict[str, Any], data: DataConfig) -> Conversation | Invalid:
    texts: dict[str, str] = {}
    for column in ("instruction", "input", "system", "output"):
        value = _text(row, column, required=column == "output")
        if isinstance(value, Invalid):
            return value
        texts[column] = value
    instruction, context = texts["instruction"], texts["input"]
    if not instruction:
        instruction, context = context, ""
    if not instruction:
        return Invalid("empty instruction")
    history = row.get("history") or []
    if data.alpaca_style == "classic":
        if history or texts["system"]:
            return Invalid("the classic Alpaca prompt has no place for a system text or a history")
        prompt = CLASSIC_WITH_INPUT if context else CLASSIC
        user = Message("user", prompt.format(instruction=instruction, input=context))
        return Conversation((user, Message("assistant", texts["output"])), raw=True)
    messages = [Message("system", texts["system"])] if texts["system"] else []
    if not isinstance(history, list):
        return Invalid("history is not a list of [user, assistant] pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            return Invalid("history is not a list of [user, assistant] pairs")
        if not all(text.strip() for text in pair):
            return Invalid("empty turn in history")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages.append(Message("user", f"{instruction}\n{context}" if context else instruction))
    return Conversation((*messages, Message("assistant", texts["output"])))


def _prompt_completion(row: dict[str, Any]) -> Conversation | Invalid:
    prompt, completion = (_text(row, column, required=True) for column in REQUIRED["prompt_completion"])
    if isinstance(prompt, Invalid):
        return prompt
    if isinstance(completion, Invalid):
        return completion
    return Conversation((Message("user", prompt), Message("assistant", completion)), raw_fallback=True)


def _turns(row: dict[str, Any], column: str, source: SourceConfig, data: DataConfig) -> Conversation | Invalid:
    turns = row[column]
    if not isinstance(turns, list):
        return Invalid(f"{column} is not a list", type(turns).__name__)
    system = _text(row, "system")
    if isinstance(system, Invalid):
        return system
    tools = _tools(row.get("tools"))
    if isinstance(tools, Invalid):
        return tools
    messages = [Message("system", system)] if system else []
    for number, turn in enumerate(turns, 1):
        message = _message(turn, source)
        if isinstance(message, Invalid):
            return replace(message, detail=f"{message.detail} (turn {number})" if message.detail else f"turn {number}")
        if message.role != "system" or message.content.strip():  # a blank system text is none
            messages.append(message)
    arranged = _arrange(messages, data.merge_turns)
    return arranged if isinstance(arranged, Invalid) else Conversation(arranged, tools)


def _message(turn: object, source: SourceConfig) -> Message | Invalid:
    if not isinstance(turn, dict):
        return Invalid("turn is not an object", type(turn).__name__)
    role_keys = (source.columns.get("role", "from"), "role")
    content_keys = (source.columns.get("content", "value"), "content")
    theirs = next((turn[key] for key in role_keys if turn.get(key) is not None), None)
    value = next((turn[key] for key in content_keys if turn.get(key) is not None), "")
    if not isinstance(theirs, str):
        return Invalid("turn without a role")
    roles = {name.lower(): ours for name, ours in source.roles.items()}
    name = theirs.strip().lower()
    role = ROLES.get(roles.get(name, name))
    if role is None:
        return Invalid("unknown role", repr(theirs[:40]))
    if role == "function_call":
        calls = _calls(value)
        return calls if isinstance(calls, Invalid) else Message("assistant", "", calls)
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            return Invalid("content has a part that is not text")
        value = "".join(texts)
    if not isinstance(value, str):
        return Invalid("content is not text", type(value).__name__)
    given = turn.get("tool_calls") if role == "assistant" else None
    calls = _calls(given) if given else ()
    if isinstance(calls, Invalid):
        return calls
    answers = turn.get("tool_call_id")
    return Message(role, value, calls, answers if role == "tool" and isinstance(answers, str) else "")


def _calls(value: object) -> tuple[ToolCall, ...] | Invalid:
    """Function calls: JSON text or values, one or a list, bare or inside OpenAI's `function` key."""
    refused = Invalid("function call is not JSON with a name and arguments")
    calls = []
    value = _json(value)
    for entry in value if isinstance(value, list) else [value]:
        entry = _json(entry)
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(function, dict):
            return refused
        arguments = _json(function.get("arguments") or {})
        if not isinstance(function.get("name"), str) or not function["name"] or not isinstance(arguments, dict):
            return refused
        call_id = entry.get("id")
        calls.append(ToolCall(function["name"], arguments, call_id if isinstance(call_id, str) else ""))
    return tuple(calls) or refused


def _tools(value: object) -> tuple[dict[str, Any], ...] | Invalid:
    blank = value is None or (isinstance(value, str) and not value.strip())
    tools = [] if blank else _json(value)
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        tool = _json(tool)
        if not isinstance(tool, dict):
            return Invalid("tools are not a JSON list of functions")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def _json(value: object) -> Any:
    """`value`, or what it says where it is JSON text; None where it is text but not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _arrange(messages: list[Message], merge_turns: bool) -> tuple[Message, ...] | Invalid:
    """Apply the rules about the order of turns; see the module's docstring and `DataConfig.merge_turns`."""
    num_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    system, turns = messages[:num_system], messages[num_system:]
    if any(message.role == "system" for message in turns):
        return Invalid("system text after the first turn")
    # An answer to nothing cannot be learnt, and what nobody answers teaches nothing.
    first = next((i for i, message in enumerate(turns) if message.role == "user"), len(turns))
    last = max((i for i, message in enumerate(turns) if message.role == "assistant"), default=-1)
    turns = turns[first : last + 1]
    if not turns:
        return Invalid("no assistant turn after a user turn")
    arranged: list[Message] = []
    for message in system + turns:
        if not message.content.strip() and not message.tool_calls:
            return Invalid(f"empty {message.role} turn")
        previous = arranged[-1] if arranged else None
        # The results of several calls stand side by side, one message each.
        if previous is None or message.role == "tool" or previous.role != message.role:
            arranged.append(message)
        elif not merge_turns:
            return Invalid("neighbouring turns of one role", message.role)
        elif previous.tool_calls and message.content.strip():
            return Invalid("assistant text after a function call without its result")
        else:
            content = "\n\n".join(text for text in (previous.content, message.content) if text.strip())
            arranged[-1] = replace(previous, content=content, tool_calls=previous.tool_calls + message.tool_calls)
    return tuple(arranged)


def _check_characters(conversation: Conversation) -> Conversation | Invalid:
    """Refuse what no tokenizer takes (lone surrogates) and the characters that mark turns."""
    texts = [message.content for message in conversation.messages]
    calls = [vars(call) for call in chain.from_iterable(message.tool_calls for message in conversation.messages)]
    try:
        if calls or conversation.tools:
            texts.append(json.dumps([calls, conversation.tools], ensure_ascii=False))
        joined = "\n".join(texts)
        joined.encode()
    except UnicodeEncodeError:
        return Invalid("text is not valid Unicode")
    except (TypeError, ValueError, RecursionError):
        return Invalid("tools or function calls are not JSON")
    if any(mark in joined for mark in MARKS):
        return Invalid("text holds a character that Unicode keeps for internal use")
    return conversation
