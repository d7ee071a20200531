"""What every data format becomes: a conversation of messages, or the reason why a row was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_distributed.errors import printable

Role = Literal["system", "user", "assistant", "tool"]

MARKS = ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3")
"""Characters that Unicode keeps for internal use. Turns are marked with them, so rows must not hold them."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]
    id: str = ""
    """As given in the data; empty where the data have none."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant message; its content may then be empty."""
    tool_call_id: str = ""
    """Of a tool message: the call that it answers; empty means the first call not yet answered."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Functions on offer, as ``{"type": "function", "function": {...}}``."""
    raw: bool = False
    """The contents are joined verbatim, with no chat template."""
    raw_fallback: bool = False
    """The same, but only where the tokenizer has no chat template."""


@dataclass(frozen=True)
class Invalid:
    """Why a row was refused: a short reason to count by, and what is particular to the row."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return printable(f"{self.reason}: {self.detail}" if self.detail else self.reason)


def to_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates take them (OpenAI's keys).

    Calls without an id are numbered with nine letters and digits, since templates of Mistral refuse anything else.
    """
    dicts: list[dict[str, Any]] = []
    num_calls = 0
    open_calls: dict[str, str] = {}
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry["tool_calls"], open_calls = [], {}
            for call in message.tool_calls:
                num_calls += 1
                call_id = call.id or f"call{num_calls:05d}"
                open_calls[call_id] = call.name
                function = {"name": call.name, "arguments": call.arguments}
                entry["tool_calls"].append({"id": call_id, "type": "function", "function": function})
        if message.role == "tool" and (message.tool_call_id or open_calls):
            entry["tool_call_id"] = message.tool_call_id or next(iter(open_calls))
            if name := open_calls.pop(entry["tool_call_id"], None):
                entry["name"] = name
        dicts.append(entry)
    return dicts
