"""Which key of ours is named for one that does not exist."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mlx_distributed.config.names import SPELLINGS, unknown_key
from mlx_distributed.config.schema import (
    Config,
    DilocoConfig,
    LoggingConfig,
    LoraConfig,
    ParallelConfig,
    SourceConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("key", "section", "words"),
    [
        ("train.epoch", TrainConfig, "did you mean train.epochs?"),
        ("modle", Config, "did you mean model?"),
        ("data.train.0.formatt", SourceConfig, "did you mean data.train.0.format?"),
        ("learning_rate", Config, "write optimizer.learning_rate"),
        ("train.learning_rate", TrainConfig, "write optimizer.learning_rate"),
        ("train.lr", TrainConfig, "write optimizer.learning_rate"),
        ("lora_r", Config, "write lora.rank"),
        ("lora.r", LoraConfig, "write lora.rank"),
        ("num_train_epochs", Config, "write train.epochs"),
        ("num_train_epoch", Config, "did you mean train.epochs?"),
        ("cutoff_len", Config, "write data.max_seq_length"),
        ("iters", Config, "write train.max_steps"),
        ("batch_size", Config, "write train.global_batch_size (all workers together) and train.micro_batch_size"),
        ("per_device_train_batch_size", Config, "write train.micro_batch_size"),
        ("resume_from_checkpoint", Config, "write the option --resume"),
        ("lora.name", LoraConfig, "write optimizer.name, scheduler.name or wandb.name"),
        ("logging.colour", LoggingConfig, "the keys here are steps"),
        ("parallel.diloco.sync_evry", DilocoConfig, "did you mean parallel.diloco.sync_every?"),
        ("parallel.diloco.overlap", DilocoConfig, "did you mean parallel.diloco.overlap_steps?"),
        ("parallel.diloco.delay_compensation", DilocoConfig, "write parallel.delay_compensation"),
        ("parallel.sync_every", ParallelConfig, "write parallel.diloco.sync_every"),
        ("parallel.dilocco", ParallelConfig, "did you mean parallel.diloco?"),
        ("sync_every", Config, "write parallel.diloco.sync_every"),
        ("fragmnts", Config, "did you mean parallel.diloco.fragments?"),
        ("outer_learning_rate", Config, "write parallel.diloco.outer_learning_rate"),
        ("diloco", Config, "write parallel.diloco"),
        ("diloco.fragments", Config, "write parallel.diloco.fragments"),
        (
            "parallel.diloco.colour",
            DilocoConfig,
            "the keys here are sync_every, fragments, overlap_steps, outer_learning_rate, outer_momentum",
        ),
    ],
)
def test_message(key: str, section: type, words: str) -> None:
    assert unknown_key(key, [field.name for field in fields(section)])[0] == f"unknown key; {words}"


def test_every_spelling_leads_to_a_key_that_exists() -> None:
    exist = {field.name for field in fields(Config)}
    for field in fields(Config):
        section = getattr(Config(), field.name)
        exist |= {f"{field.name}.{name}" for name in getattr(section, "__dataclass_fields__", {})}
    exist |= {f"data.train.0.{field.name}" for field in fields(SourceConfig)}
    others = {"the option --resume", "train.global_batch_size (all workers together) and train.micro_batch_size"}
    assert set(SPELLINGS) - exist == others
