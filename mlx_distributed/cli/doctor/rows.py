"""What becomes of the rows: every one that was read is trained on, measured with, or left out for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from mlx_distributed.cli.doctor.case import Case, Seen
from mlx_distributed.cli.doctor.finding import Finding, counted
from mlx_distributed.config.schema import DataConfig
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import Invalid

NUM_NAMED = 10
"""Reasons, and roles, that are named; all of them are counted."""

_UNKNOWN_ROLE = "unknown role"

Fate = Literal["train", "validation", "invalid", "dropped", "untrainable"]


@dataclass(frozen=True)
class Counts:
    """Of all rows that were read."""

    num_read: int
    num_train: int
    num_validation: int
    invalid: Mapping[str, int]
    """By reason, the most frequent first."""
    unknown_roles: Mapping[str, int]
    """Rows of `invalid`, by the name of the role."""
    num_dropped: int
    """Longer than `data.max_seq_length`."""
    num_untrainable: int
    """Without a trainable token."""
    num_truncated: int
    """Of `num_train` and `num_validation`."""

    def __post_init__(self) -> None:
        used = self.num_train + self.num_validation
        assert self.num_read == used + sum(self.invalid.values()) + self.num_dropped + self.num_untrainable, self


def count_rows(case: Case) -> Counts | None:
    """None where the data could not be read."""
    if case.corpus is None:
        return None
    data, refused = case.config.data, invalid_rows(case)
    fates = Counter(fate(seen, data) for seen in case.seen)
    roles = Counter(_role(invalid) for _, invalid in refused if invalid.reason == _UNKNOWN_ROLE)
    return Counts(
        num_read=case.corpus.report.num_rows,
        num_train=fates["train"],
        num_validation=fates["validation"],
        invalid=dict(Counter(invalid.reason for _, invalid in refused).most_common()),
        unknown_roles=dict(roles.most_common()),
        num_dropped=fates["dropped"],
        num_untrainable=fates["untrainable"],
        num_truncated=sum(row.num_cut > 0 for seen in case.seen if (row := seen.row) is not None),
    )


def fate(seen: Seen, data: DataConfig) -> Fate:
    """What becomes of a row that holds a conversation; one that nobody could tokenise counts as used."""
    if seen.outcome is None or seen.row is not None:
        return seen.split
    if seen.outcome.invalid is not None:
        return "invalid"
    is_long = seen.outcome.num_tokens > data.max_seq_length
    return "dropped" if is_long and data.overlong != "truncate" else "untrainable"


def invalid_rows(case: Case) -> list[tuple[Place, Invalid]]:
    """Those that hold no conversation, then those that cannot be tokenised."""
    refused = [] if case.corpus is None else [*case.corpus.refused]
    outcomes = ((seen.place, seen.outcome) for seen in case.seen)
    return refused + [(place, outcome.invalid) for place, outcome in outcomes if outcome and outcome.invalid]


def check_rows(case: Case, counts: Counts) -> Iterator[Finding]:
    """How many are used, and what is left out: why, how often, and where first."""
    data = case.config.data
    parts = [f"{counts.num_train} to train on", f"{counts.num_validation} for validation"]
    parts += [f"{number} invalid ({reason})" for reason, number in counts.invalid.items()]
    parts += [f"{counts.num_dropped} too long"] if counts.num_dropped else []
    parts += [f"{counts.num_untrainable} without a trainable token"] if counts.num_untrainable else []
    text = f"{counts.num_read} read = {' + '.join(parts)}"
    if case.corpus is not None and case.corpus.report.streaming:
        text += "; these are the first ones, and the others are read while training"
    yield Finding("rows", "ok" if counts.num_train else "problem", text)
    refused = invalid_rows(case)
    for reason, number in islice(counts.invalid.items(), NUM_NAMED):
        if reason != _UNKNOWN_ROLE:
            place, invalid = next(row for row in refused if row[1].reason == reason)
            text = f"{counted(number)} skipped, {reason}; the first is {place}"
            yield Finding("invalid rows", "warning", f"{text} ({invalid.detail})" if invalid.detail else text)
    for name, number in islice(counts.unknown_roles.items(), NUM_NAMED):
        place = next(place for place, invalid in refused if invalid.reason == _UNKNOWN_ROLE and _role(invalid) == name)
        text = f"{counted(number)} skipped for the role {name}; the first is {place}"
        mend = f"say what it is, under `roles` of the source: {{{name}: user}}, or assistant, system or tool"
        yield Finding("unknown roles", "warning", text, mend)
    if number := counts.num_dropped or counts.num_truncated:
        done = "dropped" if counts.num_dropped else "cut at the end, with the stop token"
        text = f"{counted(number)} longer than data.max_seq_length={data.max_seq_length} tokens, {done}"
        yield Finding("long rows", "warning", text, "the lengths are below; or set data.overlong")
    if counts.num_untrainable:
        first = next(seen.place for seen in case.seen if fate(seen, data) == "untrainable")
        text = f"{counted(counts.num_untrainable)} without a trainable token, left out; the first is {first}"
        mend = "data.train_on, data.train_on_eos and data.max_seq_length decide which tokens are trained"
        yield Finding("masked rows", "warning", text, mend)


def _role(invalid: Invalid) -> str:
    """Its name, which the detail quotes before the number of the turn."""
    return invalid.detail.rpartition(" (turn ")[0].strip("'\"")
