from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.parallel import adamw
from mlx_distributed.parallel.adamw import DistributedAdamW, decaying, decays

SHAPES = {"embed.weight": (17, 8), "up.weight": (24, 8), "conv.weight": (4, 3, 2), "head.weight": (17, 8)}


def random_arrays(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: mx.array(random.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def to_bytes(arrays: Arrays) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def take_step(
    optimizer: DistributedAdamW, parameters: Arrays, gradients: Arrays, state: Arrays, scale: float, rate: float
) -> Arrays:
    """The new parameters, evaluated group by group as the contract says."""
    updated: Arrays = {}
    decayed = decaying(parameters)
    for group in optimizer.update(dict(parameters), dict(gradients), state, mx.array(scale), rate, decayed):
        mx.eval(group)
        updated |= group
    return updated


@pytest.mark.parametrize(
    "optimizer", [DistributedAdamW(), DistributedAdamW((0.8, 0.95), 1e-5, 0.3), DistributedAdamW(weight_decay=0.0)]
)
def test_the_bits_are_those_of_mlx(optimizer: DistributedAdamW) -> None:
    parameters = random_arrays(0)
    reference = dict(parameters)
    theirs = optim.AdamW(
        0.0, list(optimizer.betas), optimizer.eps, weight_decay=optimizer.weight_decay, bias_correction=True
    )
    theirs.init(reference)
    state = optimizer.init(parameters)
    for step in range(50):
        rate = 1e-2 * (step + 1) / 7 if step < 7 else 1e-2 * (50 - step) / 43
        gradients = random_arrays(1 + step)
        theirs.learning_rate = rate
        reference = theirs.apply_gradients(gradients, reference)
        parameters = take_step(optimizer, parameters, gradients, state, 1.0, rate)
        assert to_bytes(parameters) == to_bytes(reference), step
    moments = {name: array for name, array in tree_flatten(theirs.state) if name.endswith((".m", ".v"))}
    assert to_bytes({name: state[name] for name in state if name != "step"}) == to_bytes(moments)
    assert state["step"].item() == 50
    assert state["step"].dtype == theirs.state["step"].dtype


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.layers = [nn.Linear(4, 4), nn.Conv2d(2, 2, 3)]
            self.norm = nn.LayerNorm(4)

    parameters = dict(tree_flatten(nn.utils.tree_map(lambda array: array + 1, Model().parameters())))
    still = {name: mx.zeros_like(array) for name, array in parameters.items()}
    optimizer = DistributedAdamW(weight_decay=0.5)
    updated = take_step(optimizer, parameters, still, optimizer.init(parameters), 1.0, 0.1)
    decayed = {name for name in parameters if not mx.array_equal(updated[name], parameters[name])}
    assert decayed == {"embed.weight", "layers.0.weight", "layers.1.weight"}
    for name in decayed:
        np.testing.assert_allclose(updated[name], parameters[name] * (1 - 0.1 * 0.5), rtol=1e-6)


def test_what_decays() -> None:
    assert decays("lora_a", mx.zeros((3, 2)))
    assert not decays("experts.biases", mx.zeros((3, 2)))
    assert not decays("experts.bias", mx.zeros((3, 2)))
    assert not decays("norm.weight", mx.zeros(3))


def test_the_scale_multiplies_the_gradients() -> None:
    optimizer, parameters, gradients = DistributedAdamW(), random_arrays(0), random_arrays(1)
    scaled = {name: gradient * 0.125 for name, gradient in gradients.items()}
    states = [optimizer.init(parameters), optimizer.init(parameters)]
    by_scale = take_step(optimizer, parameters, gradients, states[0], 0.125, 1e-3)
    by_hand = take_step(optimizer, parameters, scaled, states[1], 1.0, 1e-3)
    assert to_bytes(by_scale) == to_bytes(by_hand)
    assert to_bytes(states[0]) == to_bytes(states[1])


@pytest.mark.parametrize("group_bytes", [1, 600, 1 << 30])
def test_groups_change_memory_and_not_the_result(group_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, parameters, gradients = DistributedAdamW(), random_arrays(0), random_arrays(1)
    expected_state = optimizer.init(parameters)
    expected = take_step(optimizer, parameters, gradients, expected_state, 0.5, 1e-3)

    monkeypatch.setattr(adamw, "GROUP_BYTES", group_bytes)
    state = optimizer.init(parameters)
    left, gradients_left = dict(parameters), dict(gradients)
    sizes: list[int] = []
    found: Arrays = {}
    groups: Iterator[Arrays] = optimizer.update(left, gradients_left, state, mx.array(0.5), 1e-3, decaying(left))
    for group in groups:
        mx.eval(group)
        found |= group
        sizes.append(sum(array.nbytes for array in group.values()))
        # What has been updated is held by the caller alone.
        assert set(left) == set(gradients_left) == set(parameters) - set(found)
    assert to_bytes(found) == to_bytes(expected)
    assert to_bytes(state) == to_bytes(expected_state)
    assert all(size >= group_bytes for size in sizes[:-1])
    assert len(sizes) == {1: 4, 600: 2, 1 << 30: 1}[group_bytes]


def test_the_state_is_float32_and_starts_at_zero() -> None:
    state = DistributedAdamW().init({"w": mx.ones((2, 3), mx.bfloat16)})
    assert set(state) == {"step", "w.m", "w.v"}
    assert [(state[name].dtype, state[name].shape) for name in ("w.m", "w.v")] == [(mx.float32, (2, 3))] * 2
    assert not any(array.any().item() for array in state.values())


def test_nothing_to_train_is_an_empty_step() -> None:
    state = DistributedAdamW().init({})
    assert list(DistributedAdamW().update({}, {}, state, mx.array(1.0), 1e-3, ())) == []
    assert state["step"].item() == 1
