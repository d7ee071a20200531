from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.errors import ConfigError
from mlx_distributed.models import train_tokenizer, wrap_tokenizer
from mlx_distributed.testing import SENTENCES

TOKENIZER = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "qwen3")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining in Bern?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "It is."},
]


@given(st.text())
def test_no_text_is_lost(text: str) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(tokens) == text


def test_same_texts_same_bytes_in_another_process() -> None:
    texts = [f"{number} is {number * 7919 % 1000}, said {chr(97 + number % 26)}" for number in range(2000)]
    here = hashlib.sha256(train_tokenizer(texts, 400)).hexdigest()
    code = (
        "import hashlib; from mlx_distributed.models import train_tokenizer\n"
        "texts = [f'{number} is {number * 7919 % 1000}, said {chr(97 + number % 26)}' for number in range(2000)]\n"
        "print(hashlib.sha256(train_tokenizer(iter(texts), 400)).hexdigest())"
    )
    for parallel in ("false", "true"):
        env = os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": "7"}
        done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == here


def test_the_vocabulary_is_as_asked_for_and_begins_with_the_special_tokens() -> None:
    assert len(TOKENIZER) == 300
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.eos_token_ids) == (0, 2, {2})
    assert len(TOKENIZER.encode("324", add_special_tokens=False)) == 3
    with pytest.raises(ConfigError, match=r"vocab_size=258 is too small.* need 259"):
        train_tokenizer(SENTENCES, 258)


def test_few_texts_make_a_smaller_vocabulary() -> None:
    assert len(wrap_tokenizer(train_tokenizer(["a"], 1000), "llama")) == 259


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_conversation_begins_as_its_first_messages_do(tools: list[dict[str, Any]] | None) -> None:
    whole = TOKENIZER.apply_chat_template(CONVERSATION, tools=tools)
    for stop in range(2, len(CONVERSATION)):
        asked = CONVERSATION[stop]["role"] == "assistant"
        part = TOKENIZER.apply_chat_template(CONVERSATION[:stop], tools=tools, add_generation_prompt=asked)
        assert whole[: len(part)] == part


def test_the_template_writes_chatml() -> None:
    text = TOKENIZER.apply_chat_template(CONVERSATION[1:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nIs it raining in Bern?<|im_end|>\n<|im_start|>assistant\n"


def test_tools_and_calls_can_be_read_back() -> None:
    text = TOKENIZER.apply_chat_template(CONVERSATION, tools=TOOLS, tokenize=False)
    assert text.count("<|im_start|>system") == 1
    assert text.startswith("<|im_start|>system\nBe brief.\n\n")
    assert json.dumps(TOOLS[0]) in text
    assistant = text.split("<|im_start|>assistant\n")[1]
    call = assistant.split(TOKENIZER.tool_call_start)[1].split(TOKENIZER.tool_call_end)[0]
    assert TOKENIZER.tool_parser(call, TOOLS) == {"name": "weather", "arguments": {"city": "Bern"}}


def test_arguments_may_be_json_text_and_calls_several() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "Wait.", "tool_calls": [call, call]}
    text = TOKENIZER.apply_chat_template([message], tokenize=False)
    one = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert text == f"<|im_start|>assistant\nWait.\n{one}\n{one}<|im_end|>\n"
