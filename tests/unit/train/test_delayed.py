"""Gradients that are one update old: on any number of workers the same bits, and those that the plain loop gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from train_samples import (
    CONFIG,
    NUM_ROWS,
    NUM_STEPS,
    TinyModel,
    make_plan,
    make_rows,
    make_state,
    make_trainer,
    on_ranks,
    shared,
)

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.config import Config
from mlx_distributed.data.batch import collate
from mlx_distributed.errors import CommError, TrainingError
from mlx_distributed.parallel.adamw import STEP, DistributedAdamW, decaying
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.delayed import compensated
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

Result = tuple[list[StepInfo], dict[str, str]]


def delayed(strength: float = 0.0, **changes: Any) -> Config:
    parallel = replace(CONFIG.parallel, sync="delayed", delay_compensation=strength)
    return replace(CONFIG, parallel=replace(parallel, **changes))


def timeless(info: StepInfo) -> StepInfo:
    return replace(info, step_s=0.0, data_s=0.0, comm_s=0.0, comm_exposed_s=0.0, sent_bytes=0)


def run(state: TrainState, comm: Communicator, config: Config) -> Result:
    infos = [timeless(info) for info in make_trainer(config).steps(state, Mesh(comm))]
    return infos, state.digest()


@pytest.mark.parametrize("share", [(1.0, 1.0), (1.0, 4.0), (0.0, 1.0), (1.0, 1.0, 1.0), (3.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_any_group_takes_the_steps_of_one_worker(share: tuple[float, ...], dropout: float, strength: float) -> None:
    alone = run(make_state(dropout=dropout), LocalComm(), delayed(strength))
    states = [make_state(dropout=dropout) for _ in share]
    config = shared(delayed(strength), *share)
    assert on_ranks(len(share), lambda comm: run(states[comm.rank], comm, config)) == [alone] * len(share)


def gradient_of(model: nn.Module, step: int) -> tuple[float, int, Arrays]:
    """Summed loss, label tokens and summed gradient of a step of the plan."""
    rows, loss, num_tokens, sums = make_rows(), 0.0, 0, Arrays()
    for batch in make_plan(rows).microbatches(step):
        arrays = collate([rows[row] for row in batch])
        value, gradients = nn.value_and_grad(model, summed_loss)(
            model, mx.array(arrays.tokens), mx.array(arrays.loss_mask)
        )
        for name, gradient in dict(tree_flatten(gradients)).items():
            sums[name] = sums[name] + gradient if name in sums else gradient
        loss, num_tokens = loss + float(value), num_tokens + arrays.num_labels
    return loss, num_tokens, sums


def textbook(strength: float, delay: int = 1) -> tuple[TrainState, list[tuple[float, float]]]:
    """Plain loops: the gradient of step t + 1 is of the parameters that update t has not been applied to. Returns the
    state, and the loss and gradient norm of each step."""
    state, optimizer, told = make_state(), DistributedAdamW(), []
    ready = [(*gradient_of(state.model, step), state.parameters) for step in range(delay)]
    for step in range(NUM_STEPS):
        if step + delay < NUM_STEPS:
            ready.append((*gradient_of(state.model, step + delay), state.parameters))
        loss, num_tokens, sums, then = ready.pop(0)
        norm = math.sqrt(sum(float(mx.square(gradient).sum()) for gradient in sums.values())) / num_tokens
        told.append((loss / num_tokens, norm))
        assert CONFIG.train.max_grad_norm is not None
        scale = min(1.0, CONFIG.train.max_grad_norm / norm) / num_tokens
        gradients, now = {name: gradient * scale for name, gradient in sums.items()}, state.parameters
        if step and strength:
            for name, g in gradients.items():
                root = mx.sqrt(state.optimizer[f"{name}.v"] / (1 - 0.999**step)) + 1e-8
                gradients[name] = g + strength / root * g * g * (now[name] - then[name])
        rate = learning_rate(CONFIG.scheduler, CONFIG.optimizer.learning_rate, step, NUM_STEPS)
        decayed = decaying(now)
        for group in optimizer.update(now, gradients, state.optimizer, mx.array(1.0), rate, decayed):
            state.model.update(tree_unflatten(list(group.items())))
        mx.eval(state.parameters, state.optimizer)
    return state, told


def furthest(a: Arrays, b: Arrays) -> float:
    """The largest difference of two elements."""
    assert a.keys() == b.keys()
    return max(float(mx.abs(a[name].astype(mx.float32) - b[name].astype(mx.float32)).max()) for name in a)


@pytest.mark.parametrize("strength", [0.0, 0.5, 4.0])
def test_steps_are_those_of_the_textbook(strength: float) -> None:
    expected, told = textbook(strength)
    state = make_state()
    infos = list(make_trainer(delayed(strength)).steps(state, Mesh(LocalComm())))
    assert [info.loss for info in infos] == pytest.approx([loss for loss, _ in told], rel=1e-5)
    assert [info.grad_norm for info in infos] == pytest.approx([norm for _, norm in told], rel=1e-4)
    assert furthest(state.parameters, expected.parameters) < 1e-5
    assert furthest(state.optimizer, expected.optimizer) < 1e-5
    others = [textbook(0.0, delay=0)[0], textbook(1.0 if not strength else 0.0)[0]]
    assert all(furthest(state.parameters, other.parameters) > 1e-4 for other in others)


@pytest.mark.parametrize("size", [1, 2])
def test_every_gradient_is_applied_once(size: int) -> None:
    states = [make_state() for _ in range(size)]
    for found, _ in on_ranks(size, lambda comm: run(states[comm.rank], comm, delayed(0.5))):
        assert [info.step for info in found] == list(range(1, NUM_STEPS + 1))
        rates = [learning_rate(CONFIG.scheduler, 1e-2, step, NUM_STEPS) for step in range(NUM_STEPS)]
        assert [info.learning_rate for info in found] == rates
    for state in states:
        assert state.optimizer[STEP].item() == state.step == NUM_STEPS
        assert state.num_tokens == sum(info.num_tokens for info in found)
        assert state.pending is None


def test_a_gradient_is_corrected_as_the_paper_says() -> None:
    """Against numpy in double precision, for gradients of very unequal sizes."""
    rng = np.random.default_rng(0)
    shapes = {"matrix": (37, 11), "vector": (300,), "none": (0, 3)}
    exact = {name: rng.standard_normal(shape) * 10 ** rng.uniform(-4, 2, shape) for name, shape in shapes.items()}
    now, then = ({n: rng.standard_normal(shape) for n, shape in shapes.items()} for _ in range(2))
    second = {
        name: np.square(rng.standard_normal(shape)) * 10 ** rng.uniform(-6, 0, shape) for name, shape in shapes.items()
    }
    optimizer = DistributedAdamW(betas=(0.9, 0.99), eps=1e-6)
    moments = {f"{name}.v": mx.array(v, mx.float32) for name, v in second.items()} | {STEP: mx.array(5, mx.uint64)}
    gradients, at, before = ({n: mx.array(a, mx.float32) for n, a in each.items()} for each in (exact, now, then))
    found = compensated(gradients, mx.array(0.125), at, before, moments, optimizer, 0.7)
    assert gradients == {}
    for name in shapes:
        g = exact[name] * 0.125
        root = np.sqrt(second[name] / (1 - 0.99**5)) + 1e-6
        expected = g + 0.7 / root * g * g * (now[name] - then[name])
        assert found[name].dtype == mx.float32
        np.testing.assert_allclose(np.asarray(found[name]), expected, rtol=1e-5, atol=1e-5)


def spoil(state: TrainState, *, whole: bool) -> None:
    """Make every loss NaN, or those of the micro-batches with the last row."""
    if whole:
        state.model.norm.weight = mx.full((8,), math.inf)
    else:
        weight = state.model.embed.weight
        state.model.embed.weight = mx.concatenate([weight[:-1], mx.full((1, 8), math.nan)])
    mx.eval(state.model.parameters())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_loss_that_is_not_finite_is_skipped_and_named(size: int, strength: float) -> None:
    plan, states = make_plan(make_rows()), [make_state() for _ in range(size)]
    for state in states:
        spoil(state, whole=False)
    bad = {step: index for step in range(NUM_STEPS) for index, batch in enumerate(plan.microbatches(step))
           if NUM_ROWS - 1 in batch}  # fmt: skip
    assert 0 < len(bad) < NUM_STEPS

    def body(comm: Communicator) -> list[tuple[str | None, bool]]:
        state, found = states[comm.rank], []
        before = state.digest()
        for info in make_trainer(delayed(strength)).steps(state, Mesh(comm)):
            after = state.digest()
            found.append((info.skipped, after == before))
            assert math.isnan(info.loss) == (info.skipped is not None)
            before = after
        return found

    said = [f"step {step + 1}: the loss of micro-batch {bad[step]} is nan" if step in bad else None
            for step in range(NUM_STEPS)]  # fmt: skip
    assert on_ranks(size, body) == [[(words, words is not None) for words in said]] * size
    assert {state.optimizer[STEP].item() for state in states} == {NUM_STEPS - len(bad)}
    assert {state.step for state in states} == {NUM_STEPS}


@pytest.mark.parametrize("size", [1, 3])
def test_the_third_skip_in_a_row_ends_the_run(size: int) -> None:
    states = [make_state() for _ in range(size)]
    for state in states:
        spoil(state, whole=True)

    def body(comm: Communicator) -> tuple[str, bool]:
        state = states[comm.rank]
        before, said = state.digest(), list[str | None]()
        with pytest.raises(TrainingError) as caught:
            said.extend(info.skipped for info in make_trainer(delayed(0.5)).steps(state, Mesh(comm)))
        assert said[:2] == [f"step {step}: the loss of micro-batch 0 is nan" for step in (1, 2)]
        return str(caught.value), state.digest() == before

    for error, unchanged in on_ranks(size, body):
        assert error.startswith("step 3: the loss of micro-batch 0 is nan. That was the 3rd step in a row")
        assert unchanged
    assert {(state.step, state.num_tokens, state.num_skipped) for state in states} == {(3, 0, 3)}


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize(("size", "then"), [(1, 1), (2, 2), (3, 3), (3, 1), (1, 2)])
def test_a_stop_leaves_a_gradient_with_which_it_goes_on(size: int, then: int, strength: float) -> None:
    states, config = [make_state(dropout=0.3) for _ in range(max(size, then))], delayed(strength)

    def stop(comm: Communicator) -> list[tuple[int, bool]]:
        state = states[comm.rank]
        asked_at = 4 if comm.rank == comm.size - 1 else 99  # of gradients that this rank begins to compute
        num_asked = 0

        def wanted() -> bool:
            nonlocal num_asked
            num_asked += 1
            return num_asked >= asked_at  # who wants to stop goes on wanting it

        found = [(info.step, info.stop_requested) for info in make_trainer(config, wanted).steps(state, Mesh(comm))]
        assert state.pending is not None
        assert state.pending.here
        assert (state.pending.computed_at is not None) == (strength > 0)
        mx.eval(state.pending.sums, state.parameters, state.optimizer)
        return found

    expected, digest = run(make_state(dropout=0.3), LocalComm(), config)
    assert on_ranks(size, stop) == [[(1, False), (2, False), (3, False), (4, True)]] * size
    for state in states[size:]:  # a worker that comes later gets what the first one has
        first = states[0]
        state.restore(first.parameters, first.optimizer, first.step, first.num_tokens, first.num_skipped)
        state.pending = first.pending
    assert on_ranks(then, lambda comm: run(states[comm.rank], comm, config)) == [(expected[4:], digest)] * then


class SteepModel(TinyModel):
    """Its loss is finite and its gradient, but the square of that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = mx.zeros(1)

    def __call__(self, tokens: mx.array) -> mx.array:
        return super().__call__(tokens) * (1 + 1e25 * self.temperature)


def rare_nan() -> TrainState:
    state = make_state()
    spoil(state, whole=False)
    return state


def steep() -> TrainState:
    mx.random.seed(0)
    state = TrainState(SteepModel(), {})
    state.optimizer = make_optimizer(CONFIG).init(state.parameters)
    mx.eval(state.parameters, state.optimizer)
    return state


@pytest.mark.parametrize("sync", ["step", "delayed"])
@pytest.mark.parametrize("make", [rare_nan, steep])
def test_a_skipped_step_leaves_what_compression_owes(make: Callable[[], TrainState], sync: str) -> None:
    config = delayed(sync=sync, wire="int8")
    states = [make() for _ in range(2)]

    def body(comm: Communicator) -> list[tuple[bool, bool]]:
        state, found, before = states[comm.rank], [], b""
        for info in make_trainer(config).steps(state, Mesh(comm)):
            after = b"".join(array.tobytes() for _, array in sorted(state.feedback.residual.items()))
            found.append((info.skipped is not None, after == before))
            before = after
            if state.num_skipped == 2:  # a third one would end the run
                break
        return found

    found = on_ranks(2, body)
    assert any(skipped for skipped, _ in found[0])
    assert [skipped for skipped, _ in found[0]] == [skipped for skipped, _ in found[1]]
    for of_rank in found:
        assert all(unchanged for skipped, unchanged in of_rank if skipped)
        assert make is steep or not all(unchanged for _, unchanged in of_rank)


def test_a_peer_that_is_lost_leaves_the_last_commit() -> None:
    states = [make_state() for _ in range(2)]

    def body(comm: Communicator) -> None:
        def leave() -> bool:
            if comm.rank == 1 and states[1].step == 2:
                raise KeyboardInterrupt("gone")  # before it computes the gradient of step 4
            return False

        list(make_trainer(delayed(0.5), leave).steps(states[comm.rank], Mesh(comm)))

    lost, left = run_ranks(2, body)
    assert isinstance(left, KeyboardInterrupt)
    assert isinstance(lost, CommError)
    assert lost.peer == 1
    # That of step 3 has left, and whether its sum still comes depends on the network.
    assert lost.op in [f"all_reduce of the gradients of step {step}" for step in (3, 4)]
    assert states[0].step in (2, 3)
    expected = make_state()
    for info in make_trainer(delayed(0.5)).steps(expected, Mesh(LocalComm())):
        if info.step == states[0].step:
            break
    assert states[0].digest() == expected.digest()
