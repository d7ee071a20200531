"""A model that is spread over a pipeline gives the answers of the model in one piece, token by token."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from staged_samples import VOCAB_SIZE, close, make_run, model_folder, staged
from train_samples import on_ranks

from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.config.schema import ModelConfig
from mlx_distributed.data.tokenize import Row
from mlx_distributed.errors import CommError
from mlx_distributed.models import load
from mlx_distributed.models.stages import cut
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.evaluation import Sample, evaluate_generation
from mlx_distributed.train.pipeline import Between, Pipeline
from mlx_distributed.train.staged_generate import generate_staged

NUM_STEPS, MAX_NEW_TOKENS = 3, 6


def make_prompts() -> list[Row]:
    """Of five lengths, one of them a single token, each with an answer of two."""
    random = np.random.default_rng(3)
    rows = []
    for index in range(13):
        start = 1 + index % 5
        tokens = random.integers(3, VOCAB_SIZE, start + 2).astype(np.int32)
        rows.append(Row(tokens, np.arange(start + 2) >= start, (start, start + 2)))
    return rows


def answers(config: Config, size: int) -> list[Sample]:
    """After some steps, the same on every rank."""

    def body(comm: Communicator) -> list[Sample]:
        state, trainer, mesh, staged = make_run(config, comm, num_steps=NUM_STEPS)
        for _ in trainer.steps(state, mesh):
            pass
        _, tokenizer, _ = load(ModelConfig(path=str(model_folder(False))), lazy=True)
        pipeline = staged.pipeline if staged else None
        samples = evaluate_generation(state.model, tokenizer, make_prompts(), MAX_NEW_TOKENS, mesh.dp, pipeline)
        close(mesh, comm)
        return samples

    found = on_ranks(size, body)
    assert all(samples == found[0] for samples in found)
    return found[0]


@cache
def whole(method: str) -> list[Sample]:
    return answers(staged(1, method), 1)


@pytest.mark.parametrize(
    ("method", "size", "num_stages", "settings"),
    [
        ("full", 2, 2, {"activations": "keep"}),
        ("lora", 3, 3, {"split": (1, 1, 2)}),
        ("full", 2, 2, {"schedule": "interleaved", "chunks": 2}),
        ("full", 4, 2, {}),
    ],
    ids=str,
)
def test_answers_are_those_of_one_piece(method: str, size: int, num_stages: int, settings: dict[str, object]) -> None:
    found = answers(staged(num_stages, method, **settings), size)
    assert found == whole(method)
    assert len({sample.generated for sample in found}) > 5


def test_a_last_worker_that_tells_of_something_else_is_named() -> None:
    model, _, _ = load(ModelConfig(path=str(model_folder(False))), lazy=True)
    stage = cut(model, 0, 2)
    stage.eval()

    def body(comm: Communicator) -> None:
        if comm.rank:
            comm.broadcast(mx.zeros((3, 1), mx.uint32), 1, "a test")
            comm.barrier("a test")
        else:
            generate_staged(Pipeline([stage], [Between(32, mx.float32)] * 2, comm), [[[5, 6], [7, 8]]], 3, ())

    error = run_ranks(2, body)[0]
    assert isinstance(error, CommError)
    assert error.peer == 1
    assert "sent mlx.core.uint32(3, 1) where mlx.core.uint32(2, 1) was due" in str(error)
