"""A model, rows and a plan that train in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config, OptimizerConfig, SchedulerConfig, TrainConfig
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.tokenize import Row
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

T = TypeVar("T")

VOCAB_SIZE, NUM_ROWS, NUM_STEPS = 16, 21, 7
RARE = VOCAB_SIZE - 1
"""A token that stands in the last row only."""

CONFIG = Config(
    train=TrainConfig(global_batch_size=10, micro_batch_size=2),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    scheduler=SchedulerConfig(warmup_steps=2),
)


class TinyModel(nn.Module):
    """Token ids [B, L] -> logits [B, L, V]; predicts a token from the one before it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 8)
        self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, VOCAB_SIZE, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + self.dropout(nn.gelu(layer(hidden)))
        return self.head(self.norm(hidden))


def make_rows(num_rows: int = NUM_ROWS, seed: int = 0) -> list[Row]:
    """Of 3 to 12 tokens, at least one of which is a target."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(3, 13, num_rows):
        loss_mask = random.random(length) < 0.6
        loss_mask[0], loss_mask[1] = False, True
        rows.append(Row(random.integers(0, RARE, length).astype(np.int32), loss_mask))
    rows[-1].tokens[0] = RARE
    return rows


def make_plan(rows: list[Row], config: Config = CONFIG, num_steps: int = NUM_STEPS) -> Plan:
    """Every third step has a single row: the rest of an epoch."""
    sizes = config.train
    lengths = [len(row.tokens) for row in rows]
    return Plan(
        lengths,
        [(0, len(rows), 1.0)],
        sizes.global_batch_size,
        sizes.micro_batch_size,
        config.seed,
        max_steps=num_steps,
        micro_batch_tokens=sizes.micro_batch_tokens,
        packing=config.data.packing,
    )


def make_trainer(config: Config = CONFIG, stop_requested: Callable[[], bool] = lambda: False) -> Trainer:
    rows = make_rows()
    return Trainer(Phases(config, make_plan(rows, config), rows, stop_requested))


def make_state(config: Config = CONFIG, dropout: float = 0.0, seed: int = 0) -> TrainState:
    """Evaluated, so that another thread may go on with it."""
    mx.random.seed(seed)
    state = TrainState(TinyModel(dropout), {})
    state.optimizer = make_optimizer(config).init(state.parameters)
    mx.eval(state.parameters, state.optimizer)
    return state


def shared(config: Config, *share: float) -> Config:
    return replace(config, parallel=replace(config.parallel, nproc=len(share), share=share))


def on_ranks(size: int, body: Callable[[Communicator], T]) -> list[T]:
    """What each rank of a group of this size returned: of one alone, or of a group over gRPC."""
    results = [body(LocalComm())] if size == 1 else run_ranks(size, body)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]  # the exceptions are gone
