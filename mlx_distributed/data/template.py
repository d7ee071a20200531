"""The chat template: Jinja as transformers runs it, with the blocks that it marks as generated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_distributed.data.messages import MARKS
from mlx_distributed.errors import DataError

_BLOCK_START, _BLOCK_END = MARKS[:2]
_BLOCK = re.compile(f"([{_BLOCK_START}{_BLOCK_END}])")
_TODAY = datetime(2024, 7, 26)
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the code of a template can raise."""


class RenderError(Exception):
    """The template does not take these messages."""


@dataclass(frozen=True)
class Rendered:
    text: str
    blocks: tuple[tuple[int, int], ...]
    """Where the ``{% generation %}`` blocks that are not blank stand, in characters."""


def read_template(chat_template: str) -> str:
    """`data.chat_template`, which is Jinja text or a file with it, as text.

    Raises:
        DataError: it cannot be read or is not valid Jinja.
    """
    try:
        text = chat_template if "{" in chat_template else Path(chat_template).read_text(encoding="utf-8")
        _compile(text)
    except (OSError, ValueError) as error:
        raise DataError(f"data.chat_template {chat_template!r} cannot be read: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.chat_template is not valid Jinja, line {error.lineno}: {error.message}") from error
    return text


class ChatTemplate:
    """The chat template of a run.

    Args:
        tokenizer: a tokenizer of transformers, or mlx-lm's wrapper around one.
        chat_template: Jinja text or a file with it; None takes the tokenizer's own.

    Raises:
        DataError: the template cannot be read or is not valid Jinja.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._given = None if chat_template is None else read_template(chat_template)
        self._variables = tokenizer.special_tokens_map
        # Not every template ends a turn with the tokenizer's eos; none ends it with the token that begins a text.
        begin, eos = tokenizer.bos_token, tokenizer.eos_token
        added = [token for token in tokenizer.added_tokens_decoder.values() if str(token) != begin]
        self.stop_tokens = _longest_first([*map(str, added), eos])
        """What may stand behind a turn to end it."""
        self.special_stop_tokens = _longest_first([*(str(token) for token in added if token.special), eos])
        """Those of them that no turn says itself, as it may say ``</tool_call>``."""

    @property
    def exists(self) -> bool:
        own = self._tokenizer.chat_template or getattr(self._tokenizer, "has_chat_template", False)
        return self._given is not None or bool(own)

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> Rendered:
        """The text of a conversation; with `prompt`, up to where the next assistant turn begins.

        Raises:
            RenderError: the template does not take it.
        """
        if self._given is None and not self._tokenizer.chat_template:  # mlx-lm wraps some templates written in Python
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
            return Rendered(text, ())
        template = _compile(self._given or self._tokenizer.get_chat_template(None, tools))
        try:
            return _take_blocks(
                template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **self._variables)
            )
        except _FAILURES as error:
            raise RenderError(str(error)) from error


def _longest_first(tokens: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({token for token in tokens if token and token.strip()}, key=lambda token: (-len(token), token)))


def _take_blocks(marked: str) -> Rendered:
    parts: list[str] = []
    blocks: list[tuple[int, int]] = []
    at = start = 0
    for part in _BLOCK.split(marked):
        if part == _BLOCK_START:
            start = at
        elif part == _BLOCK_END:
            blocks.append((start, at))
        else:
            parts.append(part)
            at += len(part)
    text = "".join(parts)
    return Rendered(text, tuple(block for block in blocks if text[slice(*block)].strip()))


class _Generation(Extension):
    """The ``{% generation %}`` block of transformers: what it holds is put between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_BLOCK_START}{caller()}{_BLOCK_END}"


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """With what transformers offers to chat templates, and its rules for white space; templates are foreign code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    # One date for all: templates that show today's would give other data on the day of a resume.
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _TODAY.strftime}
    return environment.from_string(template)
