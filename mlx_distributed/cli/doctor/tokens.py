"""What the model is shown: the chat template, the token that begins a text, those that end turns, and the labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_distributed.cli.doctor.case import Case, Seen
from mlx_distributed.cli.doctor.finding import Finding, Status, counted, percent
from mlx_distributed.data.messages import Conversation, Message, to_dicts
from mlx_distributed.data.template import ChatTemplate, RenderError
from mlx_distributed.data.tokenize import Row

NUM_RENDERED = 200
"""Conversations whose beginnings are rendered too, spread over the rows."""

_REASONING = Conversation(
    (
        Message("user", "How much is 2 + 2?"),
        Message("assistant", "<think>\nTwo and two.\n</think>\n\n4"),
        Message("user", "And 3 + 3?"),
        Message("assistant", "<think>\nThree and three.\n</think>\n\n6"),
    )
)
_REFUSED = "the chat template refuses the conversation"


@dataclass(frozen=True)
class Labels:
    """Of the rows to train on."""

    num_tokens: int
    num_labels: int


def check_template(case: Case) -> Iterator[Finding]:
    """Whether there is one, takes the conversations, and shows the first messages as it shows them alone."""
    if case.template is None or not case.seen:
        return
    name = "chat template"
    talks = [seen for seen in case.seen if not case.is_raw(seen.conversation)]
    if not case.template.exists:
        if not talks:  # Otherwise nothing could be tokenised, which is said already.
            yield Finding(name, "ok", "none, and none is needed: the rows are plain text")
        return
    if raw := len(case.seen) - len(talks):
        text = f"the model has one, and plain text goes past it: {counted(raw)}"
        yield Finding(name, "warning", text, "give the rows as messages, or train a base model")
    refused = [seen for seen in talks if _reason(seen) == _REFUSED]
    if refused:
        assert refused[0].outcome is not None
        text = f"it refuses {len(refused)} of {counted(len(talks))}; the first is {refused[0].place}"
        text += f" ({refused[0].outcome.invalid.detail})" if refused[0].outcome.invalid else ""
        status: Status = "warning" if len(refused) < len(talks) else "problem"
        yield Finding(name, status, text, "mend the rows or data.chat_template")
    if taken := [seen for seen in talks if _reason(seen) != _REFUSED]:
        yield _check_prefixes(case.template, taken)


def _check_prefixes(template: ChatTemplate, talks: Sequence[Seen]) -> Finding:
    looked = talks[:: -(-len(talks) // NUM_RENDERED)]
    changing = [seen for seen in looked if not keeps_prefixes(template, seen.conversation)]
    lost = sum(bool(_reason(seen)) for seen in talks)
    verdict = "the labels of every row were decoded and are its assistant turns"
    if lost:
        verdict = f"the labels of {counted(lost)} are not their assistant turns, which are skipped"
    if changing:
        text = (
            f"present; not prefix-preserving: with a later message it shows earlier ones otherwise, in "
            f"{len(changing)} of {counted(len(looked), 'conversation')} looked at, first {changing[0].place}. Turns "
            f"are found by marks in their place, so {verdict}"
        )
        mend = "what it strips from earlier turns, such as their reasoning, is not learnt: one row per turn keeps it"
        return Finding("chat template", "warning", text, mend)
    text = f"present, and prefix-preserving in {counted(len(looked), 'conversation')} looked at; {verdict}"
    if not keeps_prefixes(template, _REASONING):
        text += "; it would strip the reasoning from earlier turns, which these have not"
    return Finding("chat template", "warning" if lost else "ok", text)


def keeps_prefixes(template: ChatTemplate, conversation: Conversation) -> bool:
    """Whether the first k messages, where the template takes them, are shown as the first of k + 1, but for a token
    behind the last one."""
    messages, tools = to_dicts(conversation.messages), list(conversation.tools) or None
    before = ""
    for number in range(1, len(messages) + 1):
        try:
            text = template.render(messages[:number], tools).text
        except RenderError:
            continue
        ends = [token for token in ("", *template.stop_tokens) if before.endswith(token) and text.endswith(token)]
        if not any(text.startswith(before.removesuffix(token)) for token in ends):
            return False
        before = text
    return True


def check_begin(case: Case) -> Iterator[Finding]:
    """The token that begins a text must be there once, if the tokenizer puts one there."""
    rows, tokenizer = _rows(case), case.tokenizer
    if tokenizer is None or not rows:
        return
    bos = tokenizer.bos_token_id
    if bos is None:
        yield Finding("BOS", "ok", "the tokenizer has none")
        return
    doubled = [seen for seen, row in rows if row.tokens[:2].tolist() == [bos, bos]]
    missing = [seen for seen, row in rows if row.tokens[0] != bos]
    if doubled:
        text = f"{tokenizer.bos_token} stands twice before {counted(len(doubled))}; the first is {doubled[0].place}"
        yield Finding("BOS", "problem", text, "take it out of the chat template, or out of the text of the rows")
    elif missing and tokenizer.encode("a")[0] == bos:
        text = f"the tokenizer begins a text with {tokenizer.bos_token}; {counted(len(missing))} without it"
        yield Finding("BOS", "warning", text, "put {{ bos_token }} at the beginning of data.chat_template")
    else:
        yield Finding("BOS", "ok", f"{tokenizer.bos_token} is never doubled")


def check_stop(case: Case) -> Iterator[Finding]:
    """The token that ends a turn must be trained, and be one that generation stops at."""
    rows, tokenizer, template = _rows(case), case.tokenizer, case.template
    if tokenizer is None or template is None or not rows:
        return
    name = "stop token"
    if not case.config.data.train_on_eos:
        yield Finding(name, "warning", "data.train_on_eos=false: the model does not learn to end a turn", "set it true")
        return
    ids = {tokenizer.convert_tokens_to_ids(token): token for token in template.stop_tokens}
    last = [_stop(row, ids) for _, row in rows if not row.num_cut]
    ends = Counter(token for token in last if token is not None)
    without = len(last) - ends.total()
    generation = case.architecture.get("eos_token_id")
    stops = {*(generation if isinstance(generation, list) else [generation]), tokenizer.eos_token_id}
    shown = ", ".join(token for token, _ in ends.most_common())
    if without:
        text = f"none in the labels of {without} of {counted(len(last))}"
        mend = "let data.chat_template end a turn with the eos token"
        yield Finding(name, "warning" if ends else "problem", text, mend)
    elif ends and not any(number in stops and token in ends for number, token in ids.items()):
        text = f"turns end with {shown}, which is trained, but generation stops at {tokenizer.eos_token} alone"
        yield Finding(name, "warning", text, "make it the eos_token of the tokenizer, or end turns with that one")
    elif ends:
        pads = tokenizer.pad_token_id == tokenizer.eos_token_id
        text = f"{shown} is in the labels of every row"
        text += "; that it is also the token of padding does no harm, as labels go by position" if pads else ""
        yield Finding(name, "ok", text)


def count_labels(case: Case) -> Labels | None:
    """None where nothing was tokenised."""
    rows = [row for seen, row in _rows(case) if seen.split == "train"]
    if not rows:
        return None
    return Labels(sum(len(row.tokens) for row in rows), sum(int(row.loss_mask.sum()) for row in rows))


def check_labels(case: Case, labels: Labels) -> Iterator[Finding]:
    """How much of what is computed teaches something."""
    text = f"{labels.num_labels} of {labels.num_tokens} tokens are trained on"
    share = percent(labels.num_labels, labels.num_tokens)
    yield Finding("labels", "ok", f"{text} ({share}), data.train_on={case.config.data.train_on}")


def check_special(case: Case) -> Iterator[Finding]:
    """What a message says must not be read as a token of the template's."""
    if case.tokenizer is None or not case.seen:
        return
    tokens = [str(token) for token in case.tokenizer.added_tokens_decoder.values() if token.special]
    tokens = sorted(filter(str.strip, tokens), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # which nothing matches
    found: Counter[str] = Counter()
    places = {}
    for seen in case.seen:
        if not case.is_raw(seen.conversation):
            texts = "\n".join(message.content for message in seen.conversation.messages)
            said = set(pattern.findall(texts))
            found.update(said)
            places.update({token: seen.place for token in said if token not in places})
    for token, number in found.most_common():
        text = f"{token} in a message, taken for the token: {counted(number)}, the first is {places[token]}"
        yield Finding("special tokens", "warning", text, "write it otherwise in the rows, or leave them out")
    if not found:
        yield Finding("special tokens", "ok", "none in the text of a message")


def _rows(case: Case) -> list[tuple[Seen, Row]]:
    return [(seen, row) for seen in case.seen if (row := seen.row) is not None]


def _reason(seen: Seen) -> str:
    """Why it could not be tokenised."""
    return seen.outcome.invalid.reason if seen.outcome is not None and seen.outcome.invalid is not None else ""


def _stop(row: Row, ids: dict[int, str]) -> str | None:
    """The first stop token that is trained after what the last turn says."""
    end = row.reference[1]
    trained = row.tokens[end:][row.loss_mask[end:]].tolist()
    return next((ids[token] for token in trained if token in ids), None)
