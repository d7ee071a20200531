from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from train_samples import CONFIG, NUM_ROWS, NUM_STEPS, TinyModel, make_rows, make_state, make_trainer, on_ranks, shared

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config
from mlx_distributed.data.batch import by_length, collate
from mlx_distributed.errors import CommError, TrainingError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.evaluation import evaluate_loss
from mlx_distributed.train.loss import summed_loss
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.setup import gradient_layout, make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

ALONE = Mesh(LocalComm())

Result = tuple[list[StepInfo], dict[str, str]]


def timeless(info: StepInfo) -> StepInfo:
    """What must be equal on every rank and in every run."""
    return replace(info, step_s=0.0, data_s=0.0, comm_s=0.0, comm_exposed_s=0.0, sent_bytes=0)


def run(state: TrainState, comm: Communicator, config: Config = CONFIG) -> Result:
    infos = [timeless(info) for info in make_trainer(config).steps(state, Mesh(comm))]
    return infos, state.digest()


@pytest.mark.parametrize("share", [(1.0, 1.0), (1.0, 4.0), (0.0, 1.0), (1.0, 1.0, 1.0), (3.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_group_takes_the_steps_of_one_worker(share: tuple[float, ...], dropout: float) -> None:
    alone = run(make_state(dropout=dropout), LocalComm())
    assert len(alone[0]) == NUM_STEPS
    states = [make_state(dropout=dropout) for _ in share]
    config = shared(CONFIG, *share)
    assert on_ranks(len(share), lambda comm: run(states[comm.rank], comm, config)) == [alone] * len(share)


def test_a_step_is_told_as_it_was() -> None:
    state, trainer = make_state(), make_trainer()
    for step in range(NUM_STEPS):
        rows = [trainer.phases.rows[row] for batch in trainer.phases.plan.microbatches(step) for row in batch]
        num_tokens = int(sum(row.loss_mask.sum() for row in rows))
        batch = collate(rows)
        loss = summed_loss(state.model, mx.array(batch.tokens), mx.array(batch.loss_mask)).item() / num_tokens
        before = state.num_tokens
        info = trainer.train_step(state, ALONE)
        assert info.loss == pytest.approx(loss, rel=1e-5)
        assert (info.step, info.num_tokens, state.num_tokens - before) == (step + 1, num_tokens, num_tokens)
        assert info.learning_rate == learning_rate(CONFIG.scheduler, 1e-2, step, NUM_STEPS)
        assert 0.0 <= info.comm_s <= info.step_s
        assert info.skipped is None


@pytest.mark.parametrize("max_grad_norm", [None, 0.01, 1e9])
def test_the_gradient_is_clipped_by_its_global_norm(max_grad_norm: float | None) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, max_grad_norm=max_grad_norm))
    state = make_state()
    info = make_trainer(config).train_step(state, ALONE)
    moments = [np.asarray(array, np.float64) for name, array in state.optimizer.items() if name.endswith(".m")]
    used = math.sqrt(sum(np.square(moment).sum() for moment in moments)) / (1 - CONFIG.optimizer.betas[0])
    assert info.grad_norm > 0.01
    assert used == pytest.approx(min(info.grad_norm, max_grad_norm or math.inf), rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stop_wanted_by_one_rank_stops_all_after_the_same_step(size: int) -> None:
    wanted_at, states = 4, [make_state(dropout=0.3) for _ in range(size)]

    def body(comm: Communicator) -> tuple[list[bool], Result]:
        state = states[comm.rank]
        trainer = make_trainer(stop_requested=lambda: comm.rank == comm.size - 1 and state.step + 1 == wanted_at)
        stops = [info.stop_requested for info in trainer.steps(state, Mesh(comm))]
        return stops, run(state, comm)

    infos, digest = run(make_state(dropout=0.3), LocalComm())
    rest = infos[wanted_at:], digest
    assert on_ranks(size, body) == [([False, False, False, True], rest)] * size


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loss_that_is_not_finite_is_skipped_and_named(size: int) -> None:
    states = [make_state() for _ in range(size)]
    plan = make_trainer().phases.plan
    bad: dict[int, int] = {}  # the micro-batch of the last row, by step
    for step, (index, batch) in ((s, b) for s in range(NUM_STEPS) for b in enumerate(plan.microbatches(s))):
        if NUM_ROWS - 1 in batch:
            bad[step] = index
    assert len(bad) in (2, 3)
    for state in states:
        weight = state.model.embed.weight
        state.model.embed.weight = mx.concatenate([weight[:-1], mx.full((1, 8), math.nan)])
        mx.eval(state.model.parameters())

    def body(comm: Communicator) -> list[tuple[str | None, bool, int]]:
        state, found = states[comm.rank], []
        before = state.digest()
        for info in make_trainer().steps(state, Mesh(comm)):
            after = state.digest()
            found.append((info.skipped, after == before, state.num_skipped))
            assert math.isnan(info.loss) == (info.skipped is not None)
            before = after
        return found

    expected = []
    for step in range(NUM_STEPS):
        said = f"step {step + 1}: the loss of micro-batch {bad[step]} is nan" if step in bad else None
        in_a_row = expected[-1][2] + 1 if expected and said else int(said is not None)
        expected.append((said, said is not None, in_a_row))
    assert on_ranks(size, body) == [expected] * size


def spoil(state: TrainState) -> None:
    """Make every loss NaN."""
    state.model.norm.weight = mx.full((8,), math.inf)
    mx.eval(state.model.parameters())


@pytest.mark.parametrize("size", [1, 3])
def test_the_third_skip_in_a_row_ends_the_run(size: int) -> None:
    states = [make_state() for _ in range(size)]
    for state in states:
        spoil(state)

    def body(comm: Communicator) -> tuple[list[str | None], str, bool]:
        state = states[comm.rank]
        before, said = state.digest(), []
        with pytest.raises(TrainingError) as caught:
            said.extend(info.skipped for info in make_trainer().steps(state, Mesh(comm)))
        return said, str(caught.value), state.digest() == before

    said = [f"step {step}: the loss of micro-batch 0 is nan" for step in (1, 2, 3)]
    for found, error, unchanged in on_ranks(size, body):
        assert (found[:2], unchanged) == (said[:2], True)
        assert error.startswith(said[2])
        assert "\n" not in error
    assert {(state.step, state.num_tokens, state.num_skipped) for state in states} == {(3, 0, 3)}


def test_skips_before_a_resume_count() -> None:
    state = make_state()
    spoil(state)
    state.step, state.num_skipped = 4, 2
    with pytest.raises(TrainingError, match="step 5: the loss of micro-batch 0 is nan"):
        list(make_trainer().steps(state, ALONE))


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is() -> None:
    class SteepModel(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = mx.zeros(1)

        def __call__(self, tokens: mx.array) -> mx.array:
            return super().__call__(tokens) * (1 + mx.sqrt(self.temperature))

    state = TrainState(SteepModel(), {})
    state.optimizer = make_optimizer(CONFIG).init(state.parameters)
    before = state.digest()
    info = make_trainer().train_step(state, ALONE)
    assert math.isfinite(info.loss)
    assert info.skipped in [f"step 1: the gradient norm is {x}, though every loss is finite" for x in ("inf", "nan")]
    assert state.digest() == before
    assert state.num_skipped == 1


def draw(state: TrainState) -> None:
    mx.eval(mx.random.normal((10,)))


def evaluate(state: TrainState) -> None:
    evaluate_loss(state.model, by_length(make_rows(5, seed=3), 2), LocalComm())


@pytest.mark.parametrize("between", [draw, evaluate])
def test_dropout_does_not_depend_on_what_else_happens(between: Callable[[TrainState], object]) -> None:
    _, expected = run(make_state(dropout=0.3), LocalComm())
    state = make_state(dropout=0.3)
    for _ in make_trainer().steps(state, ALONE):
        between(state)
    assert state.digest() == expected


def test_dropout_differs_by_seed_step_and_microbatch() -> None:
    rows = make_rows(2)
    batch = collate(rows)
    losses = set()
    for seed, step, index in itertools.product((0, 1), (0, 1), (0, 1, 2)):
        state = make_state(dropout=0.3)
        loss, _ = make_trainer(replace(CONFIG, seed=seed)).phases.gradients(state, batch, step, index)
        losses.add(loss.item())
    assert len(losses) == 2 * 2 * 3


def test_a_step_that_a_peer_does_not_finish_leaves_the_last_commit() -> None:
    states = [make_state() for _ in range(2)]

    def body(comm: Communicator) -> None:
        def leave() -> bool:
            if comm.rank == 1 and states[1].step == 2:
                raise KeyboardInterrupt("gone")
            return False

        list(make_trainer(stop_requested=leave).steps(states[comm.rank], Mesh(comm)))

    lost, left = run_ranks(2, body)
    assert isinstance(left, KeyboardInterrupt)
    assert isinstance(lost, CommError)
    assert (lost.op, lost.peer) == ("all_reduce of the gradients of step 3", 1)
    expected = make_state()
    for info in make_trainer().steps(expected, ALONE):
        if info.step == 2:
            break
    assert states[0].digest() == states[1].digest() == expected.digest()


def test_at_the_end_of_the_plan_there_is_nothing_to_do() -> None:
    state = make_state()
    state.step = NUM_STEPS
    assert list(make_trainer().steps(state, ALONE)) == []


def test_gradients_travel_from_the_last_layer_to_the_first() -> None:
    (bucket,) = gradient_layout(make_state().parameters)
    assert [leaf.name for leaf in bucket.leaves] == [
        "head.weight",
        "norm.bias",
        "norm.weight",
        "layers.1.bias",
        "layers.1.weight",
        "layers.0.bias",
        "layers.0.weight",
        "embed.weight",
    ]
