"""A tokenizer for a model that starts from scratch: byte-level BPE trained on the texts of the run, with ChatML."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_distributed.errors import ConfigError
from mlx_distributed.models.upstream import TokenizerWrapper, load_tokenizer

PAD, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Every byte is a token, so that no text is unknown."""

CHAT_TEMPLATE = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}"
    "{{ '<|im_start|>system\n' ~ system ~ ('\n\n' if system else '') ~ 'These functions can be called:\n' }}"
    "{% for tool in tools %}{{ tool | tojson ~ '\n' }}{% endfor %}"
    '{{ \'A call is written as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\n\' }}'
    "{% endif %}"
    "{% for message in messages %}"
    "{% if not (tools and loop.first and message.role == 'system') %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{% set tool_call = call.function or call %}"
    "{% set given = tool_call.arguments %}"
    "{{ '\n' if message.content or not loop.first }}"
    "{{ '<tool_call>{\"name\": ' ~ tool_call.name | tojson ~ ', \"arguments\": ' }}"
    "{{ (given if given is string else given | tojson) ~ '}</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
"""The rendering of a conversation begins with that of its first messages, by which the assistant's turns are found."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """The `tokenizer.json` of a byte-level BPE tokenizer with at most `vocab_size` tokens, special ones included.

    The same texts give the same bytes on every machine. Each digit is a token, so that numbers never seen can be read.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"model.scratch.vocab_size={vocab_size} is too small: the 256 bytes and the {len(SPECIAL_TOKENS)} special "
            f"tokens alone need {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return bytes(tokenizer.to_str(), "utf-8")


def wrap_tokenizer(data: bytes, model_type: str) -> TokenizerWrapper:
    """The tokenizer of `train_tokenizer` as mlx-lm will load it from the finished model folder.

    It goes through such a folder here already, because transformers chooses the class of a tokenizer by `model_type`,
    and some classes bring their own normaliser and splitting rules (transformers 5: qwen2 and qwen3_5 apply NFC).
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(data.decode("utf-8")), eos_token=TURN_END, pad_token=PAD
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        return load_tokenizer(Path(folder))
