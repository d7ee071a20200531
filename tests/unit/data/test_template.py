from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from mlx_distributed.data.template import ChatTemplate, RenderError
from mlx_distributed.errors import DataError

Make = Callable[..., PreTrainedTokenizerFast]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("name", ["chatml", "marked", "headers", "reasoning", "tools", "strict", "plain"])
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_that_of_transformers(make_tokenizer: Make, templates: dict[str, str], name: str, prompt: bool) -> None:
    tokenizer = make_tokenizer(templates[name])
    tools = [{"type": "function", "function": {"name": "f", "description": "\u00fc <b>"}}]
    turns = [*TURNS, {"role": "user", "content": "q2"}] if prompt else TURNS
    expected = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert ChatTemplate(tokenizer, None).render(turns, tools, prompt=prompt).text == expected
    assert ChatTemplate(TokenizerWrapper(tokenizer), None).render(turns, tools, prompt=prompt).text == expected


def test_generation_blocks_are_found_and_blank_ones_are_not(make_tokenizer: Make) -> None:
    template = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    rendered = ChatTemplate(make_tokenizer(), template).render([*TURNS, {"role": "user", "content": " "}], None)
    assert rendered.text == "<q><a>< >"
    assert rendered.blocks == ((1, 2), (4, 5))


def test_the_own_template_is_text_or_a_file_and_wins(make_tokenizer: Make, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}!", encoding="utf-8")
    for given in (str(path), path.read_text()):
        assert ChatTemplate(make_tokenizer(), given).render(TURNS, None).text == "q!"


@pytest.mark.parametrize(
    ("given", "why"),
    [("nowhere.jinja", "cannot be read"), ("{% for %}", "not valid Jinja, line 1"), ("\0", "cannot be read")],
)
def test_templates_that_are_refused(make_tokenizer: Make, given: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        ChatTemplate(make_tokenizer(), given)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_what_a_template_raises_is_one_error(make_tokenizer: Make, template: str) -> None:
    with pytest.raises(RenderError):
        ChatTemplate(make_tokenizer(), template).render(TURNS, None)


def test_the_date_is_the_same_every_day(make_tokenizer: Make) -> None:
    template = ChatTemplate(make_tokenizer(), "{{ strftime_now('%d %b %Y') }}")
    assert template.render(TURNS, None).text == "26 Jul 2024"


def test_a_template_for_tools_among_several(make_tokenizer: Make) -> None:
    tokenizer: Any = make_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    template = ChatTemplate(tokenizer, None)
    assert template.render(TURNS, None).text == "plain"
    assert template.render(TURNS, [{}]).text == "with tools"


def test_whether_there_is_a_template(make_tokenizer: Make) -> None:
    assert ChatTemplate(make_tokenizer(), None).exists
    assert ChatTemplate(make_tokenizer(None), "{{ messages }}").exists
    assert not ChatTemplate(make_tokenizer(None), None).exists
    assert not ChatTemplate(TokenizerWrapper(make_tokenizer(None)), None).exists


def test_a_template_written_in_python_is_called(make_tokenizer: Make) -> None:
    def shout(messages: list[dict[str, str]], tools: object = None, **_: object) -> str:
        return "".join(message["content"].upper() for message in messages)

    template = ChatTemplate(TokenizerWrapper(make_tokenizer(None), chat_template=shout), None)
    assert template.exists
    assert template.render(TURNS, None).text == "QA"


def test_stop_tokens_are_added_tokens_but_not_the_one_that_begins(make_tokenizer: Make) -> None:
    template = ChatTemplate(make_tokenizer(), None)
    assert {"<|im_end|>", "<|end|>", "</s>", "</tool_call>"} <= set(template.stop_tokens)
    assert "<|begin|>" not in template.stop_tokens
    assert "</tool_call>" not in template.special_stop_tokens
    assert "<|begin|>" in ChatTemplate(make_tokenizer(eos_token="<|begin|>"), None).stop_tokens
