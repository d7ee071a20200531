"""The parts that a run is put together from, each by itself: rows, tokenizer, model, plan. None asks another rank."""

from __future__ import annotations

import mlx.nn as nn

from mlx_distributed.config import Config
from mlx_distributed.config.checks import workers_key
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.sources import Corpus, read_corpus
from mlx_distributed.data.template import read_template
from mlx_distributed.data.tokenize import TokenizedCorpus, tokenize_corpus
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import (
    build_scratch,
    compute_in,
    load,
    prepare,
    read_tokenizer,
    train_tokenizer,
    wrap_tokenizer,
)
from mlx_distributed.models.upstream import TokenizerWrapper


def load_rows(config: Config) -> tuple[TokenizerWrapper, TokenizedCorpus]:
    """The tokenizer and the rows of `load_all`, without the model: for looking at the data before a run.

    Raises:
        ConfigError, DataError: as a run would.
    """
    corpus = read_corpus(config.data, config.seed)
    tokenizer = load_tokenizer(config, corpus)
    return tokenizer, tokenize_corpus(corpus, tokenizer, config.data)


def load_tokenizer(config: Config, corpus: Corpus | None) -> TokenizerWrapper:
    """The tokenizer of a run, with its chat template; no weights are read, nor downloaded.

    Args:
        config: of the run.
        corpus: what the tokenizer of a model from scratch is trained from; nobody else needs it.

    Raises:
        ConfigError: it cannot be loaded.
        DataError: `data.chat_template` cannot be read.
    """
    if config.model.scratch is None:
        tokenizer = read_tokenizer(config.model)
    else:
        assert corpus is not None
        tokenizer = wrap_tokenizer(scratch_tokenizer(corpus, config), config.model.scratch["model_type"])
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(config.data.chat_template)
    return tokenizer


def load_whole(config: Config, tokenizer: TokenizerWrapper) -> nn.Module:
    """The model of `load_all` before it was cut into stages or trained; nothing of it is evaluated."""
    if config.model.scratch is None:
        model, _, _ = load(config.base, lazy=True)
    else:
        model, _ = build_scratch(config.model.scratch, tokenizer, config.seed, lazy=True)
    prepare(model, config.method, config.lora, config.seed, lazy=True)
    compute_in(model, config.precision)
    return model


def scratch_tokenizer(corpus: Corpus, config: Config) -> bytes:
    """A tokenizer trained on the training rows."""
    assert config.model.scratch is not None
    texts = (message.content for row in corpus.train for message in row.messages)
    return train_tokenizer(texts, config.model.scratch["vocab_size"])


def example_prompt(corpus: Corpus) -> str:
    """The first thing that a user says in the validation rows, or where there are none in the training rows."""
    conversation = (corpus.validation or corpus.train)[0]
    return next((message.content for message in conversation.messages if message.role == "user"), "")


def make_plan(config: Config, rows: TokenizedCorpus) -> Plan:
    """The micro-batches of every step.

    Raises:
        ConfigError: `train.micro_batch_tokens` leaves some worker without any.
    """
    plan = Plan(
        lengths=[len(row.tokens) for row in rows.train],
        spans=rows.weights,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        micro_batch_tokens=config.train.micro_batch_tokens,
        packing=config.data.packing,
    )
    limit, num_stages = config.train.micro_batch_tokens, config.parallel.pipeline.num_stages
    if limit is not None and plan.num_microbatches < config.parallel.size // num_stages:
        raise ConfigError(
            f"{workers_key(config.parallel)}={config.parallel.size}: a step of "
            f"train.global_batch_size={plan.global_batch_size} rows has at most {plan.num_microbatches} micro-batches "
            f"of train.micro_batch_tokens={limit}, so a worker would have nothing to do; use "
            f"{plan.num_microbatches * num_stages} workers or fewer, fewer tokens, or more rows"
        )
    return plan
