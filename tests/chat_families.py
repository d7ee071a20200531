"""Eight families of chat templates, and what the assistant turns read in each, said without the code that finds them.

The templates are in the manner of those in use; the tokenizers hold what is special in them as special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_distributed.data.messages import Conversation, Message
from mlx_distributed.models import train_tokenizer

CHATML = """\
{%- for m in messages -%}
  {{- '<|im_start|>' ~ m.role ~ '\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{- m.content ~ '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
  {%- else -%}
    {{- m.content ~ '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
LLAMA3 = """\
{{- bos_token -}}
{%- if tools -%}
  {{- '<|start_header_id|>system<|end_header_id|>\n\nFunctions: ' ~ tools | tojson ~ '<|eot_id|>' -}}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|start_header_id|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|end_header_id|>\n\n' -}}
  {%- if m.tool_calls -%}
    {%- if m.tool_calls | length > 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
    {%- set f = m.tool_calls[0].function -%}
    {{- '{"name": ' ~ f.name | tojson ~ ', "parameters": ' ~ f.arguments | tojson ~ '}' -}}
  {%- else -%}
    {{- m.content | trim -}}
  {%- endif -%}
  {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
MISTRAL = """\
{{- bos_token -}}
{%- set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' -%}
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {%- if tools and loop.index0 == ns.last -%}
      {{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST] ' ~ (system if loop.index0 == ns.last else '') ~ m.content ~ '[/INST]' -}}
  {%- elif m.tool_calls -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m.tool_calls -%}
      {%- if call.id | length != 9 -%}{{- raise_exception('nine characters') -}}{%- endif -%}
      {{- ({'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id}) | tojson -}}
      {{- '' if loop.last else ', ' -}}
    {%- endfor -%}
    {{- ']' ~ eos_token -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' ~ m.content | trim ~ eos_token -}}
  {%- elif m.role == 'tool' -%}
    {{- '[TOOL_RESULTS] ' ~ {'content': m.content, 'call_id': m.tool_call_id} | tojson ~ '[/TOOL_RESULTS]' -}}
  {%- elif not loop.first -%}
    {{- raise_exception('only user and assistant') -}}
  {%- endif -%}
{%- endfor -%}
"""
GEMMA = """\
{{- bos_token -}}
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- for m in messages[start:] -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' -}}
  {{- messages[0].content | trim ~ '\n\n' if start and loop.first else '' -}}
  {{- m.content | trim ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
PHI = """\
{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' -}}{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}
"""
QWEN3 = """\
{%- if tools -%}{{- '<|im_start|>system\n# Tools\n' ~ tools | tojson ~ '<|im_end|>\n' -}}{%- endif -%}
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought, answer = '', m.content -%}
    {%- if '</think>' in answer -%}
      {%- set thought = answer.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set answer = answer.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last and (loop.last or thought) -%}
      {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ answer.lstrip('\n') -}}
    {%- else -%}
      {{- answer -}}
    {%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{- '\n' if answer or not loop.first else '' -}}
      {{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
      {{- call.function.arguments | tojson ~ '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
ZEPHYR = """\
{%- for m in messages -%}
  {%- if m.role in ('system', 'user', 'assistant') -%}
    {{- '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
UNMARKED = """\
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {{- ' ASSISTANT: ' ~ m.content ~ eos_token -}}
  {%- elif m.role == 'user' -%}
    {{- 'USER: ' ~ m.content -}}
  {%- else -%}
    {{- m.content ~ ' ' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""

Turns = list[str] | None
"""What the assistant turns read, without stop tokens; None where the family has no place for what they say."""


def _assistant(conversation: Conversation) -> list[Message]:
    return [message for message in conversation.messages if message.role == "assistant"]


def _text(conversation: Conversation) -> Turns:
    turns = _assistant(conversation)
    return None if any(turn.tool_calls for turn in turns) else [turn.content for turn in turns]


def _trimmed(conversation: Conversation) -> Turns:
    turns = _text(conversation)
    return turns and [turn.strip() for turn in turns]


def _llama3(conversation: Conversation) -> Turns:
    turns = []
    for turn in _assistant(conversation):
        if len(turn.tool_calls) > 1 or (turn.tool_calls and turn.content.strip()):
            return None
        calls = [{"name": call.name, "parameters": call.arguments} for call in turn.tool_calls]
        turns.append(_json(calls[0]) if calls else turn.content.strip())
    return turns


def _mistral(conversation: Conversation) -> Turns:
    turns, num_calls = [], 0
    for turn in _assistant(conversation):
        if turn.tool_calls and turn.content.strip():
            return None
        calls = []
        for call in turn.tool_calls:
            num_calls += 1
            calls.append({"name": call.name, "arguments": call.arguments, "id": call.id or f"call{num_calls:05d}"})
        turns.append("[TOOL_CALLS] " + _json(calls) if calls else turn.content.strip())
    return turns


def _qwen3(conversation: Conversation) -> Turns:
    asked = max(index for index, message in enumerate(conversation.messages) if message.role == "user")
    turns = []
    for index, turn in enumerate(conversation.messages):
        if turn.role != "assistant":
            continue
        *before, said = turn.content.split("</think>")
        said = said.lstrip("\n") if before else said
        prose, _, thought = before[0].rpartition("<think>") if before else ("", "", "")
        if index > asked and thought.strip("\n"):
            if prose.strip() or len(before) > 1:  # Only the first thought and what follows the last would be shown.
                return None
            said = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{said}"
        elif not said.strip() and not turn.tool_calls:
            return None
        for call in turn.tool_calls:
            arguments = {"name": call.name, "arguments": call.arguments}
            said += ("\n" if said else "") + f"<tool_call>\n{_json(arguments)}\n</tool_call>"
        turns.append(said)
    return turns


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Family:
    template: str
    turns: Callable[[Conversation], Turns]
    stop: str
    special: tuple[str, ...]
    """Besides the stop token."""
    begin: str | None = None
    end: str | None = None
    """The tokenizer's eos where turns do not end with it."""
    added: tuple[str, ...] = field(default=())
    """Tokens of their own that are not special."""
    swallows: bool = False
    """Whether special tokens take the white space behind them."""


FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, _text, "<|im_end|>", ("<|im_start|>",)),
    "llama3": Family(
        LLAMA3,
        _llama3,
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "mistral": Family(
        MISTRAL,
        _mistral,
        "</s>",
        (
            *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "<s>",
    ),
    "gemma": Family(GEMMA, _trimmed, "<end_of_turn>", ("<start_of_turn>",), "<bos>", "<eos>"),
    "phi": Family(
        PHI,
        _text,
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        end="<|endoftext|>",
        swallows=True,
    ),
    "qwen3": Family(
        QWEN3, _qwen3, "<|im_end|>", ("<|im_start|>",), added=("<think>", "</think>", "<tool_call>", "</tool_call>")
    ),
    "zephyr": Family(ZEPHYR, _text, "</s>", (), "<s>"),
    "unmarked": Family(UNMARKED, _text, "</s>", (), "<s>"),
}


def make_tokenizer(family: Family, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`, with the template and the tokens of a family."""
    inner = Tokenizer.from_str(train_tokenizer(texts, vocab_size).decode())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=family.begin, eos_token=family.end or family.stop
    )
    special = [AddedToken(token, special=True, rstrip=family.swallows) for token in (family.stop, *family.special)]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(list(family.added))
    tokenizer.chat_template = family.template
    return tokenizer
