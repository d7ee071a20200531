"""Where each assistant turn stands in the text of a conversation.

Positions are offsets in characters. A turn is found in one of three ways, each checked against what the turn says:

1. by the template's own ``{% generation %}`` blocks, where it has one per assistant turn;
2. by rendering once more with every assistant turn replaced by a mark: what stands between the marks is the template's,
   and the turn is what the real text has in the place of its mark. This needs no template to keep the text of a shorter
   conversation as a prefix (those that strip the reasoning from earlier turns do not);
3. by rendering the conversation up to the turn, with and without it, where the template refuses or rewrites the marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_distributed.data.messages import MARKS, Conversation, Invalid, Message, to_dicts
from mlx_distributed.data.template import ChatTemplate, RenderError

_TURN_START, _TURN_END = MARKS[2:]
_SPACE = re.compile(r"\s*")
_TURN = re.compile(f"{_TURN_START}([0-9]+){_TURN_END}")


@dataclass(frozen=True)
class Span:
    """An assistant turn in the text: it says ``[start, end)``, and its stop token ends at `stop`.

    White space between the two is the template's. Without a stop token, `stop` equals `end`.
    """

    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class Layout:
    text: str
    spans: tuple[Span, ...]
    """One per assistant turn, in order."""


def lay_out(conversation: Conversation, template: ChatTemplate) -> Layout | Invalid:
    """Render a conversation and find its assistant turns, or say why that cannot be done."""
    messages, tools = to_dicts(conversation.messages), list(conversation.tools) or None
    try:
        rendered = template.render(messages, tools)
    except RenderError as error:
        return Invalid("the chat template refuses the conversation", str(error))
    text = rendered.text
    turns = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
    if len(rendered.blocks) == len(turns):
        blocks = zip(turns, rendered.blocks, strict=True)
        marked = [_with_stop(text, *block, conversation.messages[number], template) for number, block in blocks]
        spans = [span for span in marked if span is not None]
        if len(spans) == len(turns):
            return Layout(text, tuple(spans))
    pieces = _pieces(messages, tools, turns, template)
    found: list[Span] = []
    before = Span(0, 0, 0)
    for index, number in enumerate(turns):
        message = conversation.messages[number]
        span = None
        if pieces:
            following = conversation.messages[number + 1].content if number + 1 < len(messages) else None
            region = _between(text, before, message, pieces[index], pieces[index + 1], following, template)
            span = region and _before_stop(text, *region, message, template)
        if not span:
            region = _by_prefix(text, before.end, messages[: number + 1], tools, template)
            span = region and _with_stop(text, *region, message, template)
        if not span or span.start < before.stop:  # It may have been found in a later turn that says the same.
            return Invalid(f"the chat template {_lacks(message)}", f"message {number + 1}")
        found.append(span)
        before = span
    return Layout(text, tuple(found))


def _pieces(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, turns: Sequence[int], template: ChatTemplate
) -> list[str] | None:
    """The template's own text before, between and after the assistant turns; None where it shows one not once."""
    marked = list(messages)
    for number in turns:
        marked[number] = {"role": "assistant", "content": f"{_TURN_START}{number}{_TURN_END}"}
    try:
        pieces = _TURN.split(template.render(marked, tools).text)
    except RenderError:  # some templates count function calls and their results
        return None
    return pieces[::2] if [int(number) for number in pieces[1::2]] == list(turns) else None


def _between(
    text: str, before: Span, message: Message, head: str, tail: str, following: str | None, template: ChatTemplate
) -> tuple[int, int] | None:
    """The turn that the template puts between `head` and `tail`, without its stop token.

    Args:
        text: of the whole conversation.
        before: the assistant turn before.
        message: the turn.
        head: the template's text since the turn before.
        tail: the template's text up to the next turn.
        following: content of the next message, None after the last.
        template: of the run.
    """
    # Where the template keeps the white space at the end of a turn, it stands before what follows the mark.
    heads = range(before.end, _skip_space(text, before.end) + 1)
    start = next((begin + len(head) for begin in heads if text.startswith(head, begin)), None)
    if start is None:  # The header is another one, as where it holds an empty reasoning and the turn has its own.
        return None
    said, first = message.content.strip(), _skip_space(text, start)
    if not message.tool_calls and text.startswith(said, first):
        return start, first + len(said)
    # The template shows the turn otherwise than given (function calls, no reasoning): what follows tells its end.
    if following is None:
        end = len(text) - len(tail) if text.endswith(tail) else -1
    else:
        end = text.find(_up_to(following.strip(), tail, template), start)
    return (start, end) if end >= start else None


def _up_to(following: str, tail: str, template: ChatTemplate) -> str:
    """The template's text behind a turn, with its stop token and no more than the next message: the header of the
    assistant turn behind it may be another one in the whole conversation."""
    stop = next((len(token) for token in template.stop_tokens if tail.startswith(token)), 0)
    cut = tail.find(following, stop)
    return tail if cut < 0 else tail[: cut + len(following)]


def _by_prefix(
    text: str, at: int, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: ChatTemplate
) -> tuple[int, int] | None:
    """The last of `messages` in the text of the whole conversation, from `at` on, with its stop token."""
    try:
        prompt = template.render(messages[:-1], tools, prompt=True).text
        turn = template.render(messages, tools).text.rstrip()
    except RenderError:
        return None
    if not turn.startswith(prompt) or turn == prompt:
        return None
    turn = turn[len(prompt) :]
    start = len(prompt) if text.startswith(prompt + turn) else text.find(turn, at)
    return (start, start + len(turn)) if start >= 0 else None


def _with_stop(text: str, start: int, end: int, message: Message, template: ChatTemplate) -> Span | None:
    """The span of a turn that stands in ``[start, end)`` with or without its stop token; None if it says otherwise."""
    shown = text[start:end].rstrip()
    token = next((token for token in template.special_stop_tokens if shown.endswith(token)), "")
    if token and _says(shown.removesuffix(token), message):
        stop = start + len(shown)
        return Span(start, stop - len(token), stop)
    return _before_stop(text, start, end, message, template)


def _before_stop(text: str, start: int, end: int, message: Message, template: ChatTemplate) -> Span | None:
    """The span of a turn that stands in ``[start, end)`` without its stop token; None if it says otherwise."""
    kept = message.content[len(message.content.rstrip()) :]
    end += len(kept) if text.startswith(kept, end) else 0
    first = _skip_space(text, end)
    token = next((token for token in template.stop_tokens if text.startswith(token, first)), None)
    span = Span(start, end, end if token is None else first + len(token))
    return span if _says(text[start:end], message) else None


def _says(shown: str, message: Message) -> bool:
    """Whether `shown` is the message, but for white space and reasoning, which templates add empty or strip."""
    if shown == message.content and not message.tool_calls:
        return True
    said, shown = "".join(message.content.split()), "".join(shown.split())
    if message.tool_calls:
        return said.rpartition("</think>")[2] in shown and _shows_calls(shown, message)
    if shown.endswith(said):
        return bool(said)
    # Reasoning ends in a tag: a template that strips anything else would teach a part of the turn.
    return bool(shown) and said.endswith(shown) and said.removesuffix(shown)[-1] in ">]"


def _lacks(message: Message) -> str:
    """What is wrong with a template that does not say the message."""
    if not message.tool_calls:
        return "changes the text of an assistant turn"
    return "does not show a function call" + (" and the text beside it" if message.content.strip() else "")


def _shows_calls(shown: str, message: Message) -> bool:
    """Whether the names of all calls are there in their order, and those of their arguments."""
    at = 0
    for call in message.tool_calls:
        name = "".join(call.name.split())
        at = shown.find(name, at)
        if at < 0 or any("".join(argument.split()) not in shown[at:] for argument in call.arguments):
            return False
        at += len(name)
    return True


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # it also matches nothing
    return match.end()
