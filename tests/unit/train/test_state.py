from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from train_samples import CONFIG, TinyModel, make_state

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import CheckpointError
from mlx_distributed.parallel.adamw import decaying
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState, digest


def gradients_of(state: TrainState, value: float = 1.0) -> Arrays:
    return {name: mx.full(array.shape, value) for name, array in state.parameters.items()}


def commit(state: TrainState, num_tokens: int = 5) -> None:
    state.commit(make_optimizer(CONFIG), gradients_of(state), mx.array(0.5), 1e-2, num_tokens)


def test_the_digest_is_that_of_names_dtypes_shapes_and_bytes() -> None:
    arrays = {"b": mx.array([[1.5, 2.5]]), "a": mx.array(3, mx.uint64), "c": mx.zeros((0, 2))}
    text = b"a mlx.core.uint64 ()\n" + np.uint64(3).tobytes()
    text += b"b mlx.core.float32 (1, 2)\n" + np.array([1.5, 2.5], np.float32).tobytes()
    text += b"c mlx.core.float32 (0, 2)\n"
    assert digest(arrays) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"w": mx.array([[1.0, 2.0]]), "extra": mx.zeros(0)},
        {"v": mx.array([[1.0, 2.0]])},
        {"w": mx.array([1.0, 2.0])},
        {"w": mx.array([[1.0, 2.0]], mx.bfloat16)},
        {"w": mx.array([[2.0, 1.0]])},
        {"w": mx.array([[1.0, -2.0]])},
        {},
    ],
)
def test_any_difference_changes_the_digest(other: Arrays) -> None:
    assert digest(other) != digest({"w": mx.array([[1.0, 2.0]])})


def test_how_an_array_lies_in_memory_does_not_matter() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest({"w": mx.array(np.ascontiguousarray(values.T)).T}) == digest({"w": mx.array(values)})
    assert digest({"w": mx.array([0.0])}) != digest({"w": mx.array([-0.0])})


def test_the_digest_of_a_state_is_of_parameters_and_optimizer() -> None:
    state, same, other = make_state(), make_state(), make_state(seed=1)
    assert state.digest() == same.digest() == {"params": digest(state.parameters), "optimizer": digest(state.optimizer)}
    assert other.digest()["params"] != state.digest()["params"]
    state.optimizer["head.weight.m"] = state.optimizer["head.weight.m"] + 1
    assert state.digest()["params"] == same.digest()["params"]
    assert state.digest()["optimizer"] != same.digest()["optimizer"]


def test_a_commit_is_the_step_of_the_optimizer() -> None:
    state = make_state()
    state.num_skipped, state.metrics = 2, {"eval/loss": 1.0}
    expected, moments = state.parameters, dict(state.optimizer)
    optimizer, decayed = make_optimizer(CONFIG), decaying(expected)
    (group,) = optimizer.update(expected, gradients_of(state), moments, mx.array(0.5), 1e-2, decayed)
    gradients = gradients_of(state)
    state.commit(make_optimizer(CONFIG), gradients, mx.array(0.5), 1e-2, num_tokens=5)
    assert not gradients
    assert state.digest() == {"params": digest(group), "optimizer": digest(moments)}
    assert (state.step, state.num_tokens, state.num_skipped, state.metrics) == (1, 5, 0, {})


def test_what_is_frozen_stays() -> None:
    state = TrainState(TinyModel(), {})
    state.model.layers[0].freeze()
    frozen = dict(nn.utils.tree_flatten(state.model.layers[0].parameters()))
    state.optimizer = make_optimizer(CONFIG).init(state.parameters)
    assert not any(name.startswith("layers.0.") for name in state.parameters)
    before = digest(frozen)
    commit(state)
    assert digest(dict(nn.utils.tree_flatten(state.model.layers[0].parameters()))) == before


def test_a_skip_moves_on_and_changes_nothing_else() -> None:
    state = make_state()
    commit(state)
    before = state.digest()
    state.metrics = {"eval/loss": 1.0}
    state.skip()
    state.skip()
    assert state.digest() == before
    assert (state.step, state.num_tokens, state.num_skipped, state.metrics) == (3, 5, 2, {})
    commit(state)
    assert (state.step, state.num_tokens, state.num_skipped) == (4, 10, 0)


@pytest.mark.parametrize("between", [commit, TrainState.skip])
def test_a_restored_state_goes_on_as_the_saved_one(between: Callable[[TrainState], None]) -> None:
    saved = make_state()
    for _ in range(3):
        commit(saved)
    between(saved)
    restored = make_state(seed=7)
    restored.restore(saved.parameters, saved.optimizer, saved.step, saved.num_tokens, saved.num_skipped)
    assert restored.digest() == saved.digest()
    for state in (saved, restored):
        commit(state)
    assert restored.digest() == saved.digest()
    assert (restored.step, restored.num_tokens, restored.num_skipped) == (saved.step, saved.num_tokens, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head.weight": None}, "head.weight is missing there and mlx.core.float32(16, 8) here"),
        ({"extra": mx.zeros(2)}, "extra is mlx.core.float32(2,) there and missing here"),
        ({"head.weight": mx.zeros((8, 16))}, "head.weight is mlx.core.float32(8, 16) there and"),
        ({"head.weight": mx.zeros((16, 8), mx.bfloat16)}, "head.weight is mlx.core.bfloat16(16, 8) there and"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(changes: dict[str, mx.array | None], said: str) -> None:
    saved, state = make_state(), make_state(seed=7)
    before = state.digest()
    parameters = {name: array for name, array in (saved.parameters | changes).items() if array is not None}
    with pytest.raises(CheckpointError, match=f"^the saved state does not fit: {re.escape(said)}"):
        state.restore(parameters, saved.optimizer, 3, 0, 0)
    moments = {f"{name}.m" if name != "extra" else name: array for name, array in changes.items()}
    optimizer = {name: array for name, array in (saved.optimizer | moments).items() if array is not None}
    with pytest.raises(CheckpointError, match=r"^the saved state does not fit: "):
        state.restore(saved.parameters, optimizer, 3, 0, 0)
    assert (state.digest(), state.step) == (before, 0)


def test_restoring_takes_a_copy() -> None:
    saved = make_state()
    parameters, optimizer = saved.parameters, dict(saved.optimizer)
    before = digest(parameters), digest(optimizer)
    state = make_state(seed=7)
    state.restore(parameters, optimizer, 0, 0, 0)
    commit(state)
    assert (digest(parameters), digest(optimizer)) == before
