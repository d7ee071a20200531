"""The gradient that a group reduces is that of one plain backward pass over the whole global batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_distributed.comm.base import Communicator, LocalComm, Parts
from mlx_distributed.comm.buckets import Bucket, BucketLayout, from_buckets
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.config.schema import Config, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.tokenize import Row
from mlx_distributed.models import load, prepare
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

BATCH = 14


@dataclass
class Tapped:
    """A communicator whose sums are kept."""

    comm: Communicator
    sums: Mapping[str, mx.array] | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.comm, name)

    def all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[Bucket]:
        reduced = self.comm.all_reduce(layout, num_leaves, buckets, what, feedback)
        self.sums = from_buckets(layout, reduced)
        return reduced


def make_rows() -> list[Row]:
    """Rows of 3 to 40 tokens, of which 1 to all but the first are targets."""
    random = np.random.default_rng(0)
    rows = []
    for length in random.integers(3, 41, BATCH):
        loss_mask = random.random(length) < random.random()
        loss_mask[0], loss_mask[1] = False, True
        rows.append(Row(random.integers(0, 250, length).astype(np.int32), loss_mask))
    return rows


def make_state(config: Config) -> TrainState:
    model, _, _ = load(config.model)
    prepare(model, config.method, config.lora, config.seed)
    if config.method == "lora":  # A fresh adapter is zero, and so are half of its gradients.
        mx.random.seed(1)
        model.update(tree_map(lambda a: a + mx.random.normal(a.shape) / 8, model.trainable_parameters()))
    state = TrainState(model, {})
    state.optimizer = make_optimizer(config).init(state.parameters)
    mx.eval(state.parameters, state.optimizer)  # A lazy array belongs to the thread that made it.
    return state


def plain_gradient(state: TrainState, rows: Sequence[Row]) -> dict[str, mx.array]:
    """The mean over label tokens, in textbook form: one padded batch, no code of the trainer."""
    length = max(len(row.tokens) for row in rows)
    tokens = mx.array(np.stack([np.pad(row.tokens, (0, length - len(row.tokens))) for row in rows]))
    mask = mx.array(np.stack([np.pad(row.loss_mask, (0, length - len(row.loss_mask))) for row in rows]))

    def loss_of(model: nn.Module) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()

    _, gradient = nn.value_and_grad(state.model, loss_of)(state.model)
    mx.eval(gradient)
    return dict(tree_flatten(gradient))


def norm(arrays: Iterable[mx.array]) -> float:
    return math.sqrt(sum(float(np.square(np.asarray(array, np.float64)).sum()) for array in arrays))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("share", [(1.0,), (1.0, 1.0), (3.0, 1.0), (1.0, 1.0, 1.0), (1.0, 0.0, 5.0)], ids=str)
def test_the_gradient_of_a_group(tied: Path, method: str, share: tuple[float, ...]) -> None:
    config = Config(
        model=ModelConfig(path=str(tied)),
        method=method,
        lora=LoraConfig(dropout=0.0),
        train=TrainConfig(global_batch_size=BATCH, micro_batch_size=2),
        parallel=ParallelConfig(nproc=len(share), share=share),
    )
    rows = make_rows()
    plan = Plan([len(row.tokens) for row in rows], [(0, BATCH, 1.0)], BATCH, 2)
    assert sorted(itertools.chain(*plan.microbatches(0))) == list(range(BATCH))
    states = [make_state(config) for _ in share]
    expected = plain_gradient(states[0], rows)

    def reduced(comm: Communicator) -> Mapping[str, mx.array] | None:
        tapped = Tapped(comm)
        Trainer(Phases(config, plan, rows)).train_step(states[comm.rank], Mesh(dp=tapped))
        return tapped.sums

    for sums in [reduced(LocalComm())] if len(share) == 1 else run_ranks(len(share), reduced):
        assert isinstance(sums, Mapping), sums
        num_tokens = int(sum(row.loss_mask.sum() for row in rows))
        found = {name: sums[name] / num_tokens for name in expected}
        assert set(sums) == {*expected, "tally.loss", "tally.num_tokens", "tally.stop"}
        difference = norm(found[name] - expected[name] for name in expected)
        assert difference <= 1e-6 * norm(expected.values())
