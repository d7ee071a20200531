"""Rows that are there twice, and what training has of the validation rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_distributed.cli.doctor.case import Seen
from mlx_distributed.cli.doctor.finding import Finding, counted
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import Conversation, Message, to_dicts

NUM_EXAMPLES = 3

Pair = tuple[Place, Place]
"""Of a row and of the first one like it."""


@dataclass(frozen=True)
class Duplicates:
    """Rows like an earlier one, but for white space."""

    within_train: tuple[Pair, ...]
    across: tuple[Pair, ...]
    """Validation rows that are in training."""
    same_prompt: tuple[Pair, ...]
    """Validation rows whose prompt is in training, with another answer."""


def find_duplicates(seen: Sequence[Seen]) -> Duplicates:
    """Of valid rows, those to train on first."""
    whole: dict[bytes, Place] = {}
    prompts: dict[bytes, Place] = {}
    within: list[Pair] = []
    across: list[Pair] = []
    same_prompt: list[Pair] = []
    for row in seen:
        key, place = _digest(row.conversation, row.conversation.messages), row.place
        prompt = row.conversation.messages[:-1]  # An assistant turn is the last.
        asked = _digest(row.conversation, prompt) if prompt else None
        if row.split == "train":
            if key in whole:
                within.append((place, whole[key]))
            whole.setdefault(key, place)
            if asked is not None:
                prompts.setdefault(asked, place)
        elif key in whole:
            across.append((place, whole[key]))
        elif asked in prompts:
            same_prompt.append((place, prompts[asked]))
    return Duplicates(tuple(within), tuple(across), tuple(same_prompt))


def check_duplicates(found: Duplicates) -> Iterator[Finding]:
    """A validation loss over rows that were trained on says little."""
    name = "duplicates"
    if found.within_train:
        text = f"{counted(len(found.within_train))} to train on more than once: {_listed(found.within_train)}"
        yield Finding(name, "warning", text, "remove them, or weigh whole sources with `weight`")
    if found.across:
        text = f"{counted(len(found.across))} for validation in training too: {_listed(found.across)}"
        yield Finding(name, "warning", text, "remove them from one side: the validation loss is too good")
    if found.same_prompt:
        text = f"{counted(len(found.same_prompt))} for validation with a prompt that training answers otherwise"
        yield Finding(name, "warning", f"{text}: {_listed(found.same_prompt)}", "hold out by prompt, not by row")
    if found == Duplicates((), (), ()):
        yield Finding(name, "ok", "none within training, nor between training and validation")


def _digest(conversation: Conversation, messages: Sequence[Message]) -> bytes:
    """Of what is said, white space counted as one blank."""
    said = [entry | {"content": " ".join(str(entry["content"]).split())} for entry in to_dicts(messages)]
    text = json.dumps([said, conversation.tools], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _listed(pairs: Sequence[Pair]) -> str:
    shown = ", ".join(
        f"{place} as {f'line {first.line}' if place.file == first.file else first}"
        for place, first in pairs[:NUM_EXAMPLES]
    )
    return f"{shown}, ..." if len(pairs) > NUM_EXAMPLES else shown
