from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_samples import CONFIG, make_plan, make_rows, make_state, on_ranks, shared

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays, make_layout
from mlx_distributed.config import Config
from mlx_distributed.data.batch import Batch, collate
from mlx_distributed.errors import TrainingError
from mlx_distributed.models import build_scratch, isolate, train_tokenizer, wrap_tokenizer
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import SENTENCES
from mlx_distributed.train import phases as phases_module
from mlx_distributed.train.attempt import Attempt
from mlx_distributed.train.halving import Halving, explained, is_out_of_memory
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

METAL = (
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8 bytes."
)
LARGE = replace(CONFIG, train=replace(CONFIG.train, global_batch_size=16, micro_batch_size=8))
PACKED = replace(LARGE, data=replace(LARGE.data, packing=True))


class Small(Phases):
    """A worker that has memory for so many rows."""

    max_rows = 1 << 30

    def gradients(
        self, state: TrainState, batch: Batch, step: int, index: int, part: int = 0
    ) -> tuple[mx.array, Arrays]:
        if batch.num_rows > self.max_rows:
            raise RuntimeError(METAL)
        return super().gradients(state, batch, step, index, part)


def phases_of(config: Config, max_rows: int = 1 << 30) -> Small:
    rows = make_rows(64)
    phases = Small(config, make_plan(rows, config), rows)
    phases._gradient_layout = make_layout(make_state(config).parameters, bucket_bytes=256)
    phases.max_rows = max_rows
    return phases


def packing_state() -> TrainState:
    """Of a model of mlx-lm, whose attention knows where a row ends."""
    tokenizer = wrap_tokenizer(train_tokenizer(SENTENCES, 300), "llama")
    arch = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model, _ = build_scratch(arch | {"num_attention_heads": 2}, tokenizer, 0)
    isolate(model)
    return TrainState(model, {})


def sums_of(phases: Phases, state: TrainState, comm: Communicator) -> Arrays:
    """The sums of the first step over all ranks, the tally among them."""
    work = phases.work(0)
    sums = phases.start(state, work, phases.compute(state, work, comm), comm)()
    mx.eval(sums)
    return sums


def assert_same(sums: Arrays, undisturbed: Arrays) -> None:
    assert sums.keys() == undisturbed.keys()
    for name, array in sums.items():
        mine, due = (np.asarray(each, np.float64) for each in (array, undisturbed[name]))
        assert np.linalg.norm(mine - due) <= 1e-6 * np.linalg.norm(due), name


@pytest.mark.parametrize(
    ("message", "out_of_memory"),
    [
        (METAL, True),
        ("[metal::malloc] Resource limit (499000) exceeded.", True),
        ("[malloc] Unable to allocate 268435456 bytes.", True),
        (
            "[METAL] Command buffer execution failed: Insufficient Memory "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            True,
        ),
        ("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)", False),
        ("[matmul] Last dimension of first input with shape (2,3) must match", False),
    ],
)
def test_what_is_taken_for_a_want_of_memory(message: str, out_of_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is out_of_memory


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=9),
    halvings=st.integers(0, 4),
    too_large=st.none() | st.integers(1, 200),
)
def test_parts_are_all_rows_in_order_and_as_small_as_can_be(
    lengths: list[int], halvings: int, too_large: int | None
) -> None:
    rows = make_rows(len(lengths))
    made: dict[int, tuple[int, ...]] = {}

    def make(numbers: tuple[int, ...]) -> Batch:
        batch = collate([rows[number] for number in numbers])
        made[id(batch)] = numbers
        return batch

    numbers = tuple(range(len(rows)))
    parts = Halving(halvings=halvings, too_large=too_large).parts(numbers, make)
    assert tuple(number for part in parts for number in made[id(part)]) == numbers
    assert len(parts) >= min(2**halvings, len(rows))
    assert too_large is None or all(part.num_rows == 1 or part.tokens.size < too_large for part in parts)


@pytest.mark.parametrize("config", [LARGE, PACKED], ids=["side by side", "packed"])
def test_one_of_two_workers_runs_out_of_memory(config: Config) -> None:
    """The row of the issue: the run goes on with half the micro-batch there, and the sums are those of the step."""
    config = shared(config, 1.0, 1.0)
    told: list[str] = []

    def body(comm: Communicator, max_rows: int) -> Arrays:
        phases = phases_of(config, max_rows if comm.rank == 1 else 8)
        phases.halving.tell = told.append
        state = make_state(config)
        if config.data.packing:
            state = packing_state()
            phases._gradient_layout = make_layout(state.parameters)
        return sums_of(phases, state, comm)

    undisturbed = on_ranks(2, lambda comm: body(comm, 8))
    assert not told
    halved = on_ranks(2, lambda comm: body(comm, 4))
    assert_same(halved[1], undisturbed[1])
    assert_same(halved[0], halved[1])
    (line,) = told
    assert re.match(rf"step 1: out of memory for 8 rows, \d+ tokens \({re.escape(METAL)}\); this worker", line)


def test_the_smaller_size_is_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    phases, undisturbed = phases_of(LARGE, max_rows=2), phases_of(LARGE)
    state, other = make_state(LARGE), make_state(LARGE)
    infos, due = ([*Trainer(each).steps(of, Mesh(LocalComm()))] for each, of in ((phases, state), (undisturbed, other)))
    assert [info.num_tokens for info in infos] == [info.num_tokens for info in due]
    assert [info.loss for info in infos] == pytest.approx([info.loss for info in due], rel=1e-5)
    assert state.step == other.step
    assert 2 <= capsys.readouterr().out.count("out of memory") <= 6 < len(infos) * 2


@pytest.mark.parametrize("keep", [False, True])
def test_whatever_evaluation_fails_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """Also where some buckets are on their way already."""
    config = replace(LARGE, train=replace(LARGE.train, micro_batch_size=4))
    state = make_state(config)
    due = sums_of(phases_of(config), state, LocalComm())
    evaluate, countdown = mx.eval, iter(())

    def fail(*arrays: object) -> None:
        if next(countdown, None) == "fail":
            raise RuntimeError(METAL)
        evaluate(*arrays)

    monkeypatch.setattr(phases_module.mx, "eval", fail)
    num_lines, first = 0, 2 if keep else 0
    num_evaluations = 4 - first + len(phases_of(config).layout(state))  # Of micro-batches, and then of buckets.
    for number in range(num_evaluations):
        phases = phases_of(config)
        told: list[str] = []
        phases.halving.tell = told.append
        work = phases.work(0)
        sums = phases.begin(state, work)
        # Somebody else has been lost, who was to compute the rest.
        parts = [*phases.add(state, work, sums, range(2), lambda: None, keep=True)] if keep else []
        countdown = iter(["go on"] * number + ["fail"])
        parts = [*phases.add(state, work, sums, range(first, 4), lambda: None, keep)]
        countdown = iter(())
        held = phases.start(state, work, iter(parts), LocalComm())()
        assert_same(held, due)
        num_lines += len(told)
    assert num_lines == num_evaluations


def test_an_attempt_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def take(max_rows: int) -> dict[str, mx.array]:
        state = make_state(LARGE)
        attempt = Attempt(phases_of(LARGE, max_rows), state)
        attempt.reduce(range(2), LocalComm())
        attempt.commit()
        return state.parameters

    assert_same(take(3), take(8))
    assert "out of memory" in capsys.readouterr().out


def test_a_worker_that_was_started_again_computes_halves() -> None:
    phases = phases_of(LARGE, max_rows=2)
    phases.halving.halvings = 2
    due = sums_of(phases_of(LARGE), make_state(LARGE), LocalComm())
    assert_same(sums_of(phases, make_state(LARGE), LocalComm()), due)


def test_parts_have_dropout_of_their_own() -> None:
    phases = phases_of(LARGE)
    assert len({phases.dropout_seed(0, index, part) for index in range(3) for part in range(3)}) == 9
    state = make_state(LARGE, dropout=0.5)
    whole = sums_of(phases, state, LocalComm())
    phases.halving.halvings = 1
    halves, again = (sums_of(phases, state, LocalComm()) for _ in range(2))
    assert all(mx.array_equal(halves[name], again[name]) for name in halves)
    assert not mx.allclose(halves["head.weight"], whole["head.weight"])


def test_a_single_row_that_does_not_fit_ends_the_run() -> None:
    phases, state = phases_of(LARGE, max_rows=0), make_state(LARGE)
    phases.halving.tell = lambda line: None
    with pytest.raises(TrainingError, match=r"step 1: out of memory for a single row of \d+ tokens .*max_seq_length"):
        sums_of(phases, state, LocalComm())
    mx.eval(state.parameters)  # Whole: no tracer of a gradient is left in it.


def test_other_errors_are_nobodys_business() -> None:
    def fail() -> None:
        raise RuntimeError("[matmul] shapes do not fit")

    phases = phases_of(LARGE)
    work = phases.work(0)
    state = make_state(LARGE)
    with pytest.raises(RuntimeError, match="shapes"):
        [*phases.add(state, work, phases.begin(state, work), range(2), fail, keep=False)]
    with pytest.raises(RuntimeError, match="shapes"), explained():
        fail()


def test_what_cannot_be_halved_is_explained() -> None:
    def update() -> None:
        raise RuntimeError(METAL)

    message = re.escape(METAL) + r".*train.gradient_checkpointing=true"
    with pytest.raises(TrainingError, match=message), explained():
        update()
