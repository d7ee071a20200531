"""The interpreter gives the losses and gradients of the whole model, micro-batch by micro-batch, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from staged_samples import NUM_LAYERS, VOCAB_SIZE, model_folder
from train_samples import on_ranks

from mlx_distributed.comm.base import Communicator
from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.errors import CommError
from mlx_distributed.models import load, prepare
from mlx_distributed.models.outline import describe
from mlx_distributed.models.stages import Stage, cut
from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zb_h1
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.validate import lower
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.pipeline import Between, Microbatch, Pipeline

NUM = 5
"""Micro-batches, the third of which has no label token."""
Found = dict[int, dict[str, bytes]]


def make_batches() -> list[Microbatch]:
    random, batches = np.random.default_rng(0), []
    for index in range(NUM):
        length = int(random.integers(5, 12))
        tokens = mx.array(random.integers(0, VOCAB_SIZE, (2, length)).astype(np.int32))
        loss_mask = mx.array(random.random((2, length)) < (0.6 if index != 2 else 0.0))
        batches.append(Microbatch(tokens, loss_mask, index))
    mx.eval([[batch.tokens, batch.loss_mask] for batch in batches])
    return batches


def whole(tied: bool):  # type: ignore[no-untyped-def]  # any class of mlx-lm
    model, _, _ = load(ModelConfig(path=str(model_folder(tied))))
    prepare(model, "full", LoraConfig(), 0)
    return model


def expected(tied: bool) -> tuple[list[float], dict[int, dict[str, mx.array]]]:
    """By one backward pass through the whole model for each micro-batch."""
    model, losses, found = whole(tied), [], {}
    for index, batch in enumerate(make_batches()):
        parameters = model.trainable_parameters()

        def loss_of(values: dict, batch: Microbatch = batch) -> mx.array:
            model.update(values)
            return summed_loss(model, batch.tokens, batch.loss_mask)

        loss, gradients = mx.value_and_grad(loss_of)(parameters)
        model.update(parameters)
        found[index] = dict(tree_flatten(gradients))
        mx.eval(loss, found[index])
        losses.append(float(np.asarray(loss)))
    return losses, found


def make_stages(edges: Sequence[int], tied: bool = False) -> list[Stage]:
    stages = [cut(whole(tied), *pair) for pair in pairwise(edges)]
    for stage in stages:
        stage.train()
        mx.eval(stage.parameters())
    return stages


def run(
    schedule: Schedule, edges: Sequence[int], keep: bool, tied: bool = False
) -> tuple[list[float], list[list[tuple[int, dict[str, np.ndarray]]]], list[float]]:
    """Losses, gradients by worker, and the losses of forward passes alone."""
    outline, stages = describe(whole(tied)), make_stages(edges, tied)
    inputs = [Between(outline.width, outline.dtypes[start]) for start in edges[:-1]]

    def body(comm: Communicator) -> tuple[dict[int, float], list[tuple[int, dict[str, np.ndarray]]], list[float]]:
        pipeline = Pipeline(stages[comm.rank :: comm.size], inputs, comm, keep)
        losses, gradients = {}, []
        for done in pipeline.run(lower(schedule), make_batches(), "a test"):
            if done.loss is not None:
                losses[done.microbatch] = done.loss
            arrays = {name: np.array(array) for name, array in done.gradients.items()}
            gradients.append((done.microbatch, arrays))
        return losses, gradients, list(pipeline.losses(make_batches(), "a test"))

    found = on_ranks(schedule.num_workers, body)
    losses = [found[-1][0][index] for index in range(NUM)]
    return losses, [gradients for _, gradients, _ in found], found[-1][2]


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize(
    ("schedule", "edges"),
    [
        (one_f_one_b(1, NUM), [0, 4]),
        (one_f_one_b(2, NUM), [0, 1, 4]),
        (gpipe(3, NUM), [0, 1, 2, 4]),
        (zb_h1(4, NUM), [0, 1, 2, 3, 4]),
        (interleaved(2, NUM, 2), [0, 1, 2, 3, 4]),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else str(value),
)
def test_gradients_are_those_of_the_whole_model(schedule: Schedule, edges: list[int], keep: bool) -> None:
    assert edges[-1] == NUM_LAYERS
    losses, by_worker, forward = run(schedule, edges, keep)
    expected_losses, expected_gradients = expected(tied=False)
    assert losses == forward == expected_losses
    assert losses[2] == 0.0
    together: Found = {index: {} for index in range(NUM)}
    for gradients in by_worker:
        for index, arrays in gradients:
            together[index] |= {name: array.tobytes() for name, array in arrays.items()}
    for index, arrays in expected_gradients.items():
        assert together[index] == {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def test_both_parts_of_a_tied_embedding_add_up() -> None:
    _, by_worker, _ = run(one_f_one_b(2, NUM), [0, 2, 4], keep=False, tied=True)
    _, expected_gradients = expected(tied=True)
    name = "model.embed_tokens.weight"
    for index, arrays in expected_gradients.items():
        parts = [dict(gradients)[index][name] for gradients in by_worker]
        whole_gradient = np.asarray(arrays[name])
        difference = np.linalg.norm(parts[0] + parts[1] - whole_gradient)
        assert difference <= 1e-6 * np.linalg.norm(whole_gradient)


def test_a_worker_that_sends_something_else_is_named() -> None:
    outline, stages = describe(whole(False)), make_stages([0, 2, 4])

    def body(comm: Communicator) -> None:
        # The first worker believes that the hidden state has other dtypes between the stages.
        dtype = outline.dtypes[0] if comm.rank else mx.float16
        inputs = [Between(outline.width, outline.dtypes[0]), Between(outline.width, dtype)]
        wire = None if comm.rank else mx.float16
        pipeline = Pipeline([stages[comm.rank]], inputs, comm, wire_dtype=wire)
        list(pipeline.run(lower(one_f_one_b(2, NUM)), make_batches(), "a test"))

    error = run_ranks(2, body)[1]
    assert isinstance(error, CommError)
    assert error.peer == 0
    assert "sent mlx.core.float16(2, " in str(error)
    assert "for 1F0, where mlx.core.float32(2, " in str(error)
