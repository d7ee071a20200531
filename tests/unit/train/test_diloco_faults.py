"""Workers that train by themselves: losses that are not finite, peers that lie or leave, and lossy wires."""

from __future__ import annotations

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from diloco_samples import NUM_STEPS, inner_of, loosely, make_state, make_trainer, train
from train_samples import NUM_ROWS, make_plan, make_rows, on_ranks

from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.errors import CommError, TrainingError
from mlx_distributed.parallel.adamw import STEP
from mlx_distributed.parallel.data import share as cut
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.diloco import due, parts_of
from mlx_distributed.train.outer import make_fragments, names_of

LOSSES_TAG = 2


@pytest.mark.parametrize("share", [(1.0,), (1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_a_loss_that_is_not_finite_is_named_and_skipped_by_who_had_it(share: tuple[float, ...]) -> None:
    config = loosely(*share, fragments=2, overlap=1)
    states, plan = [make_state(config) for _ in share], make_plan(make_rows(), config, NUM_STEPS)
    for state in states:
        for model in (state.model, inner_of(state).model):
            model.embed.weight = mx.concatenate([model.embed.weight[:-1], mx.full((1, 8), math.nan)])
        mx.eval(state.parameters, inner_of(state).parameters)
    bad = {step: index for step in range(NUM_STEPS) for index, batch in enumerate(plan.microbatches(step))
           if NUM_ROWS - 1 in batch}  # fmt: skip
    assert 0 < len(bad) < NUM_STEPS

    def body(comm: Communicator) -> list[tuple[str | None, int]]:
        found = []
        for info in make_trainer(config).steps(states[comm.rank], Mesh(comm)):
            assert math.isnan(info.loss) == (info.skipped is not None)
            found.append((info.skipped, states[comm.rank].num_skipped))
        return found

    expected: list[tuple[str | None, int]] = []
    for step in range(NUM_STEPS):
        said = f"step {step + 1}: the loss of micro-batch {bad[step]} is nan" if step in bad else None
        expected.append((said, (expected[-1][1] + 1 if expected else 1) if said else 0))
    assert on_ranks(len(share), body) == [expected] * len(share)
    schedule = parts_of(share, config.parallel.diloco.sync_every)
    for rank, state in enumerate(states):
        num_updates = 0
        for step in range(NUM_STEPS):
            ranges = cut(len(plan.microbatches(step)), [1.0] * len(share))
            taken = [ranges[part] for part in schedule[step % len(schedule)][rank]]
            num_updates += sum(start < stop and not start <= bad.get(step, -1) < stop for start, stop in taken)
        assert inner_of(state).optimizer[STEP].item() == num_updates


def test_a_fragment_whose_sum_is_not_finite_stays_and_the_others_move() -> None:
    config = loosely(1.0, 1.0, fragments=2, look=4)
    states = [make_state(config) for _ in range(2)]
    mine = inner_of(states[1]).model
    mine.head.weight = mx.concatenate([mine.head.weight[:-1], mx.full((1, 8), math.inf)])  # never a target
    mx.eval(mine.parameters())
    before = {name: np.array(array) for name, array in states[0].parameters.items()}
    fragments = [names_of(fragment) for fragment in make_fragments(states[0].parameters, config)]
    (spoilt,) = (fragment for fragment in fragments if "head.weight" in fragment)

    def body(comm: Communicator) -> tuple[dict[str, str], bool, bool]:
        state = states[comm.rank]
        for info in make_trainer(config).steps(state, Mesh(comm)):
            if info.step == 4:
                break
        now = state.parameters
        stayed = all(np.array_equal(np.asarray(now[name]), before[name]) for name in spoilt)
        moved = all(not np.array_equal(np.asarray(now[n]), before[n]) for n in before if n not in spoilt)
        return state.digest(), stayed, moved

    first, second = on_ranks(2, body)
    assert first == second
    assert first[1:] == (True, True)


@pytest.mark.parametrize("size", [1, 3])
def test_the_third_skip_in_a_row_ends_the_run(size: int) -> None:
    config = loosely(*[1.0] * size)
    states = [make_state(config) for _ in range(size)]
    for state in states:
        state.model.norm.weight = inner_of(state).model.norm.weight = mx.full((8,), math.inf)
        mx.eval(state.model.parameters())

    def body(comm: Communicator) -> tuple[str, int, int]:
        state = states[comm.rank]
        with pytest.raises(TrainingError) as caught:
            list(make_trainer(config).steps(state, Mesh(comm)))
        assert inner_of(state).optimizer[STEP].item() == 0
        return str(caught.value), state.num_tokens, state.num_skipped

    found = on_ranks(size, body)
    assert found == [found[0]] * size
    assert found[0][0].startswith("step 3: the loss of micro-batch 0 is nan. That was the 3rd step in a row")
    assert found[0][1:] == (0, 3)


def test_a_peer_that_is_lost_is_named() -> None:
    config = loosely(1.0, 1.0)
    states = [make_state(config) for _ in range(2)]

    def body(comm: Communicator) -> None:
        def leave() -> bool:
            if comm.rank == 1 and states[1].step == 4:
                raise KeyboardInterrupt("gone")
            return False

        list(make_trainer(config, leave).steps(states[comm.rank], Mesh(comm)))

    lost, left = run_ranks(2, body)
    assert isinstance(left, KeyboardInterrupt)
    assert isinstance(lost, CommError)
    assert lost.peer == 1


NUM = 5
"""Micro-batches of the first step."""
GOOD = [*[2.0] * NUM, *[3.0] * NUM, 0.0, 1.0]


def said(num: float) -> list[float]:
    """What a peer says of its losses, with another count of label tokens."""
    return [*GOOD[:NUM], num, *GOOD[NUM + 1 :]]


@pytest.mark.parametrize(
    "array",
    [
        mx.array(GOOD[:-1]),
        mx.array([*GOOD, 0.0]),
        mx.zeros(0),
        mx.array(1.0),
        mx.array([GOOD]),
        mx.array(GOOD).astype(mx.int32),
        mx.array(GOOD).astype(mx.float16),
        mx.array(GOOD).astype(mx.bfloat16),
        mx.array(GOOD).astype(mx.complex64),
        mx.array(said(-1.0)),
        mx.array(said(math.nan)),
        mx.array(said(math.inf)),
        mx.array(said(2.0**24)),
        mx.array(said(1e30)),
    ],
    ids=lambda array: f"{array.dtype}{tuple(array.shape)}{array.reshape(-1)[NUM : NUM + 1].tolist()}",
)
def test_losses_that_nobody_can_have_are_refused(array: mx.array) -> None:
    config = loosely(1.0, 1.0)
    state = make_state(config)
    mx.eval(array)

    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.send(array, 0, LOSSES_TAG, "the losses")
            comm.barrier("the end")
        list(make_trainer(config).steps(state, Mesh(comm)))

    refused, _ = run_ranks(2, body)
    assert isinstance(refused, CommError)
    assert (refused.op, refused.peer) == ("recv of the losses of step 1", 1)
    assert f"where {NUM} losses and counts were due" in refused.reason


def test_a_step_without_a_label_token_is_refused() -> None:
    config = loosely(1.0, 3.0)  # by which the first step is all that of the other one
    state = make_state(config)
    assert parts_of((1.0, 3.0), 1) == [[[], [0, 1]]]

    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.send(mx.zeros(2 * NUM + 2), 0, LOSSES_TAG, "the losses")
            comm.barrier("the end")
        list(make_trainer(config).steps(state, Mesh(comm)))

    refused, _ = run_ranks(2, body)
    assert isinstance(refused, CommError)
    assert refused.peer == 1


@pytest.mark.parametrize("wire", ["bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("share", [(1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
def test_ranks_agree_though_less_travels(share: tuple[float, ...], wire: str) -> None:
    whole = train(loosely(*share, fragments=2, overlap=1))[0]
    found = train(loosely(*share, fragments=2, overlap=1, wire=wire))
    assert [(end.infos, end.digest) for end in found] == [(found[0].infos, found[0].digest)] * len(share)
    assert found[0].digest != whole.digest
    moved = max(np.abs(array - found[0].parameters[name]).max() for name, array in whole.parameters.items())
    assert moved < (0.02 if wire == "int4" else 0.004)


def owed_by_step(config: Config) -> list[list[dict[int, bytes]]]:
    """By rank and step, what is owed by bucket."""
    states = [make_state(config) for _ in range(config.parallel.nproc)]

    def body(comm: Communicator) -> list[dict[int, bytes]]:
        state = states[comm.rank]
        return [
            {index: array.tobytes() for index, array in state.feedback.residual.items()}
            for _ in make_trainer(config).steps(state, Mesh(comm))
        ]

    return on_ranks(config.parallel.nproc, body)


@pytest.mark.parametrize("wire", ["int8", "int4"])
@pytest.mark.parametrize("overlap", [0, 1])
def test_what_one_fragment_owes_is_not_paid_with_another(wire: str, overlap: int) -> None:
    config = loosely(1.0, 1.0, every=6, fragments=3, overlap=overlap, wire=wire, look=1)
    fragments = make_fragments(make_state(config).parameters, config)
    assert [len(fragment) for fragment in fragments] == [1, 1, 1]  # so that a bucket has the number of its fragment
    for owed in owed_by_step(config):
        assert len(owed) == NUM_STEPS
        for step, (before, after) in enumerate(pairwise([{}, *owed]), start=1):
            changed = {index for index in after if after[index] != before.get(index)}
            if step < NUM_STEPS:
                assert changed == {due(config.parallel.diloco, step)} - {None}  # who looks waits at once
            else:
                assert changed == {0, 1, 2}
