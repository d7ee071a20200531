"""A byte-level tokenizer trained on a few lines, and chat templates in the manner of those in use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = (
    "The cook asked for water, rice and a little salt.",
    "What is the answer? The answer is that there is none.\n\nAsk again tomorrow.",
    "def add(a, b):\n    return a + b\n",
    "Numbers: 1, 2, 3, 40, 500 and 6000; names: user, assistant, system, tool.",
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|begin|>", "<|end|>", "<|header|>", "</s>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)
REASONING = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- set answer = m.content.split('</think>')[-1].lstrip('\n') -%}
    {%- set thought = '' -%}
    {%- if '</think>' in m.content -%}
      {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > ns.last and (loop.last or thought) -%}
      {{- '<think>\n' + thought + '\n</think>\n\n' + answer -}}
    {%- else -%}
      {{- answer -}}
    {%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {%- if m.content or not loop.first %}{{- '\n' -}}{% endif -%}
      {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' -}}
    {%- endfor -%}
  {%- else -%}
    {{- m.content -}}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{% endif -%}
"""
TOOLS = """\
{%- if tools -%}
  {{- '<|im_start|>system\nYou may call: ' + (tools | tojson) + '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' + m.content -}}
  {%- for call in m.tool_calls or [] -%}
    {{- '\n<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) -}}
    {{- '\n</tool_call>' -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{% endif -%}
"""
STRICT = """\
{{- bos_token -}}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(calls=0, users=0) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {%- set ns.users = ns.users + 1 -%}
    {%- if tools and ns.users == users | length %}{{- '[TOOLS]' + (tools | tojson) -}}{% endif -%}
    {{- '[INST] ' + m.content + ' [/INST]' -}}
  {%- elif m.role == 'tool' -%}
    {%- if not ns.calls or m.tool_call_id | length != 9 %}{{ raise_exception('a result needs a call') }}{% endif -%}
    {%- set ns.calls = ns.calls - 1 -%}
    {{- '[RESULT] ' + m.content + ' [/RESULT]' -}}
  {%- elif m.tool_calls -%}
    {%- set ns.calls = m.tool_calls | length -%}
    {{- ' [CALLS] ' + (m.tool_calls | map(attribute='function') | list | tojson) + '</s>' -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' + m.content | trim + ' </s>' -}}
  {%- else -%}
    {{- raise_exception('only user and assistant') -}}
  {%- endif -%}
{%- endfor -%}
"""
PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "headers": HEADERS,
    "reasoning": REASONING,
    "tools": TOOLS,
    "strict": STRICT,
    "plain": PLAIN,
}


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(
        chat_template: str | None = CHATML,
        *,
        eos_token: str | None = "<|im_end|>",
        adds_bos: bool = False,
        trim_offsets: bool = False,
        nfc: bool = False,
    ) -> PreTrainedTokenizerFast:
        inner = Tokenizer(models.BPE())
        inner.normalizer = normalizers.NFC() if nfc else None
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(LINES, trainer)
        byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
        begin = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", inner.token_to_id("<|begin|>"))]
        )
        inner.post_processor = processors.Sequence([byte_level, begin]) if adds_bos else byte_level
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<|begin|>", eos_token=eos_token, pad_token=eos_token
        )
        tokenizer.add_tokens(list(ADDED))
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: white space is part of the words, unknown characters are bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pieces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(pieces)
    all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *SPECIAL, *all_bytes], show_progress=False)
    inner.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|begin|>", eos_token="<|im_end|>", unk_token="<unk>"
    )
