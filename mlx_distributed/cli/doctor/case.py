"""What the doctor looks at: all of a run that can be had without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn

from mlx_distributed.cli.doctor.finding import Finding
from mlx_distributed.cli.parts import load_tokenizer, load_whole, make_plan
from mlx_distributed.config import Config
from mlx_distributed.data.files import Place
from mlx_distributed.data.messages import Conversation
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.sources import Corpus, gather
from mlx_distributed.data.template import ChatTemplate
from mlx_distributed.data.tokenize import Outcome, Row, TokenizedCorpus, assemble, tokenize_rows
from mlx_distributed.errors import ConfigError, DataError
from mlx_distributed.models.load import WEIGHTS, locate
from mlx_distributed.models.upstream import TokenizerWrapper, load_config


@dataclass(frozen=True, eq=False)
class Seen:
    """A row that holds a conversation."""

    split: Literal["train", "validation"]
    place: Place
    conversation: Conversation
    outcome: Outcome | None = None
    """None where nothing could be tokenised."""

    @property
    def row(self) -> Row | None:
        """None where it is left out."""
        return self.outcome and self.outcome.row


@dataclass(frozen=True, eq=False)
class Case:
    """A run, as far as its parts could be had."""

    config: Config
    corpus: Corpus | None = None
    seen: tuple[Seen, ...] = ()
    """The rows of `corpus`, those to train on first."""
    tokenizer: TokenizerWrapper | None = None
    template: ChatTemplate | None = None
    model: nn.Module | None = None
    """Prepared for training, and nothing of it evaluated."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """As in config.json."""
    tokenized: TokenizedCorpus | None = None
    plan: Plan | None = None
    findings: tuple[Finding, ...] = ()
    """Why parts are missing, or would be refused."""

    def is_raw(self, conversation: Conversation) -> bool:
        """Whether it is plain text to the model."""
        has_template = self.template is not None and self.template.exists
        return conversation.raw or (conversation.raw_fallback and not has_template)

    def with_finding(self, finding: Finding) -> Case:
        return replace(self, findings=(*self.findings, finding))


def look(config: Config) -> Case:
    """Read, tokenise and plan as a run would, and go on where it would be refused. Raises nothing that a user can
    mend."""
    return _tokenized(_with_model(_with_tokenizer(_with_corpus(Case(config)))))


def _with_corpus(case: Case) -> Case:
    config = case.config
    try:
        corpus = gather(config.data, config.seed)
    except DataError as error:
        return case.with_finding(Finding("data", "problem", str(error)))
    train = zip(corpus.train_places, corpus.train, strict=True)
    validation = zip(corpus.validation_places, corpus.validation, strict=True)
    seen = [*(Seen("train", *row) for row in train), *(Seen("validation", *row) for row in validation)]
    case = replace(case, corpus=corpus, seen=tuple(seen))
    try:
        corpus.check(config.data)
    except DataError as error:
        case = case.with_finding(Finding("data", "problem", str(error)))
    return case


def _with_tokenizer(case: Case) -> Case:
    config = case.config
    if config.model.scratch is not None and not (case.corpus and case.corpus.train):
        return case  # There is nothing to train one from.
    try:
        tokenizer = load_tokenizer(config, case.corpus)
        return replace(case, tokenizer=tokenizer, template=ChatTemplate(tokenizer, config.data.chat_template))
    except (ConfigError, DataError) as error:
        return case.with_finding(Finding("tokenizer", "problem", str(error)))


def _with_model(case: Case) -> Case:
    config, scratch = case.config, case.config.model.scratch
    if case.tokenizer is None:
        return case
    try:
        if scratch is not None:
            return replace(case, model=load_whole(config, case.tokenizer), architecture=scratch)
        folder = locate(config.model, local_files_only=True)
        if not Path(str(config.model.path)).expanduser().is_dir() and not any(folder.glob(WEIGHTS)):
            text = f"the weights of {config.model.path} are not on this disk"
            return case.with_finding(Finding("model", "warning", text, "the run downloads them"))
        # From the folder, so that nothing more is asked of the network.
        config = replace(config, model=replace(config.model, path=str(folder), revision=None))
        return replace(case, model=load_whole(config, case.tokenizer), architecture=load_config(folder))
    except ConfigError as error:
        return case.with_finding(Finding("model", "problem", str(error)))


def _tokenized(case: Case) -> Case:
    corpus, data = case.corpus, case.config.data
    if corpus is None or case.tokenizer is None:
        return case
    try:
        train = [*tokenize_rows(corpus.train, case.tokenizer, data)]
        validation = [*tokenize_rows(corpus.validation, case.tokenizer, data)]
    except DataError as error:
        return case.with_finding(Finding("tokens", "problem", str(error)))
    outcomes = [*train, *validation]
    seen = tuple(replace(row, outcome=outcome) for row, outcome in zip(case.seen, outcomes, strict=True))
    case = replace(case, seen=seen)
    if any(finding.check == "data" for finding in case.findings):
        return case  # A run would not come to this.
    try:
        tokenized = assemble(corpus, train, validation, data)
    except DataError as error:
        return case.with_finding(Finding("data", "problem", str(error)))
    try:
        return replace(case, tokenized=tokenized, plan=make_plan(case.config, tokenized))
    except ConfigError as error:
        return replace(case, tokenized=tokenized).with_finding(Finding("batches", "problem", str(error)))
