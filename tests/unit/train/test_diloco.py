"""Workers that train by themselves and agree now and then: the steps of the plain loop, told as they were."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from diloco_samples import NUM_STEPS, Textbook, inner_of, loosely, make_state, make_trainer, run, timeless, train
from hypothesis import given
from hypothesis import strategies as st
from train_samples import TinyModel, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train.diloco import LAG, due, parts_of
from mlx_distributed.train.outer import momentum_name
from mlx_distributed.train.schedule import learning_rate
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.step_info import StepInfo


@given(st.integers(1, 60), st.data())
def test_every_fragment_leaves_once_in_every_window(sync_every: int, data: st.DataObject) -> None:
    fragments = data.draw(st.integers(1, sync_every))
    diloco = DilocoConfig(sync_every=sync_every, fragments=fragments)
    assert due(diloco, 0) is None
    windows = [[due(diloco, 1 + w * sync_every + i) for i in range(sync_every)] for w in range(3)]
    leaving = [[fragment for fragment in window if fragment is not None] for window in windows]
    assert leaving == [list(range(fragments))] * 3
    at = [step for step in range(1, 3 * sync_every + 1) if due(diloco, step) is not None]
    assert min(later - earlier for earlier, later in pairwise([0, *at])) >= sync_every // fragments


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 40))
def test_every_part_is_taken_once_and_nobody_is_left_behind(weights: list[float], num_steps: int) -> None:
    schedule = parts_of(tuple(weights), num_steps)
    assert len(schedule) == num_steps
    for step in schedule:
        assert len(step) == len(weights)
        assert sorted(part for parts in step for part in parts) == list(range(len(weights)))
    taken = [sum(len(step[rank]) for step in schedule) for rank in range(len(weights))]
    shares = [len(weights) * num_steps * weight / sum(weights) for weight in weights]
    assert all(num > share - 1 - 1e-6 for num, share in zip(taken, shares, strict=True))
    if len(weights) == 2:
        assert all(abs(num - share) < 1 + 1e-6 for num, share in zip(taken, shares, strict=True))
    # Nobody is so busy that it would be done sooner if another one took a part from it.
    busiest = max(num / weight for num, weight in zip(taken, weights, strict=True))
    assert all((num + 1) / weight >= busiest * (1 - 1e-9) for num, weight in zip(taken, weights, strict=True))


@given(st.integers(1, 9), st.integers(1, 20), st.floats(0.01, 100))
def test_workers_of_one_speed_take_one_part_each(size: int, num_steps: int, speed: float) -> None:
    assert parts_of((speed,) * size, num_steps) == [[[part] for part in range(size)]] * num_steps


@pytest.mark.parametrize("share", [(1.0,), (1.0, 1.0), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize(
    ("every", "fragments", "overlap"),
    [
        (4, 1, 0),
        (4, 2, 0),
        (4, 1, 1),
        (4, 2, 1),
        (5, 1, 4),  # a sum is under way at the end
        (11, 2, 4),  # a fragment leaves at the end
        (20, 1, 0),  # none ever leaves before
    ],
)
def test_steps_are_those_of_the_textbook(share: tuple[float, ...], every: int, fragments: int, overlap: int) -> None:
    config = loosely(*share, every=every, fragments=fragments, overlap=overlap)
    expected, found = Textbook(config), train(config)
    first = found[0]
    for end in found:
        assert (end.infos, end.digest, end.num_tokens) == (first.infos, first.digest, first.num_tokens)
        assert all(end.own[name].tobytes() == array.tobytes() for name, array in end.parameters.items())
    assert [info.step for info in first.infos] == list(range(1, NUM_STEPS + 1))
    assert [info.num_tokens for info in first.infos] == [told.num_tokens for told in expected.told]
    assert first.num_tokens == sum(told.num_tokens for told in expected.told)
    assert [info.loss for info in first.infos] == pytest.approx([told.loss for told in expected.told], rel=1e-5)
    norms = [told.grad_norm for told in expected.told]
    assert [info.grad_norm for info in first.infos] == pytest.approx(norms, rel=1e-4)
    rates = [learning_rate(config.scheduler, 1e-2, step, NUM_STEPS) for step in range(NUM_STEPS)]
    assert [info.learning_rate for info in first.infos] == rates
    assert not any(info.stop_requested or info.skipped for info in first.infos)
    for name, array in first.parameters.items():
        np.testing.assert_allclose(array, expected.agreed[name], rtol=0, atol=1e-5)
        np.testing.assert_allclose(first.momentum[momentum_name(name)], expected.momentum[name], rtol=0, atol=1e-5)


def test_dropout_depends_on_the_micro_batch_and_not_on_who_has_it() -> None:
    """Before the first update all compute what one worker computes that agrees with others in every step."""
    config = loosely(1.0, 1.0, 1.0)
    together = replace(config, parallel=replace(config.parallel, sync="step", share="even", nproc=1))
    mx.random.seed(0)
    state = init_state(TinyModel(0.3), together, LocalComm())
    first = make_trainer(together).train_step(state, Mesh(LocalComm()))
    for end in train(config, 0.3):
        assert (end.infos[0].loss, end.infos[0].num_tokens) == (first.loss, first.num_tokens)


def test_the_outer_step_matters() -> None:
    """What the comparison with the textbook can tell apart."""
    config = loosely(1.0, 1.0, fragments=2, overlap=1)
    diloco = config.parallel.diloco
    found = []
    for changes in ({}, {"outer_learning_rate": 0.6}, {"outer_momentum": 0.8}, {"overlap_steps": 0}, {"fragments": 1}):
        parallel = replace(config.parallel, diloco=replace(diloco, **changes))
        found.append(Textbook(replace(config, parallel=parallel)).agreed)
    for other in found[1:]:
        assert max(np.abs(other[name] - found[0][name]).max() for name in other) > 1e-4


@pytest.mark.parametrize("share", [(1.0,), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize("look", [None, 5, 1])
def test_who_looks_at_the_state_is_told_of_it_and_changes_nothing(share: tuple[float, ...], look: int | None) -> None:
    config = loosely(*share, every=6, fragments=2, overlap=2, look=look)
    states = [make_state(config, 0.3) for _ in share]
    looked_at = {step for step in range(1, NUM_STEPS + 1) if step == NUM_STEPS or (look and step % look == 0)}

    def body(comm: Communicator) -> tuple[list[StepInfo], dict[str, str]]:
        state, infos = states[comm.rank], list[StepInfo]()
        for info in make_trainer(config).steps(state, Mesh(comm)):
            assert info.step <= state.step <= info.step + LAG
            assert (info.step == state.step) == (info.step in looked_at)
            if info.step in looked_at:
                assert state.pending is None or state.pending.here
                assert state.num_tokens == sum(info.num_tokens for info in infos) + info.num_tokens
            assert info.step_s >= info.comm_exposed_s >= 0
            infos.append(timeless(info))
        return infos, state.digest()

    expected = train(replace(config, checkpoint=replace(config.checkpoint, steps=None)), 0.3)[0]
    assert on_ranks(len(share), body) == [(expected.infos, expected.digest)] * len(share)


@pytest.mark.parametrize("share", [(1.0,), (2.0, 1.0), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize(("wanted_at", "under_way"), [(1, True), (2, True), (3, False), (4, True), (9, False)])
def test_a_stop_wanted_by_one_rank_stops_all_after_the_same_step(
    share: tuple[float, ...], wanted_at: int, under_way: bool
) -> None:
    config = loosely(*share, every=6, fragments=2, overlap=2)
    states = [make_state(config, 0.3) for _ in share]
    last = min(wanted_at + LAG, NUM_STEPS)

    def body(comm: Communicator) -> tuple[list[bool], bool, list[StepInfo], dict[str, str], bool]:
        state = states[comm.rank]
        wanted = lambda: comm.rank == comm.size - 1 and state.step + 1 >= wanted_at  # noqa: E731
        infos = list(make_trainer(config, wanted).steps(state, Mesh(comm)))
        assert [info.step for info in infos] == list(range(1, last + 1))
        assert [info.step for info in infos if info.stop_requested] == [last]
        assert state.step == last <= wanted_at + LAG + 1
        assert state.num_tokens == sum(info.num_tokens for info in infos)
        pending = state.pending is not None and state.pending.here
        infos, digest = run(state, comm, config)
        same = state.digest()["params"] == inner_of(state).digest()["params"]
        return [info.stop_requested for info in infos], pending, infos, digest, same

    expected = train(config, 0.3)[0]
    rest = [False] * (NUM_STEPS - last), under_way, expected.infos[last:], expected.digest, True
    assert on_ranks(len(share), body) == [rest] * len(share)


def test_the_last_step_before_a_stop_says_so() -> None:
    config = loosely(1.0, 1.0, look=5)
    states = [make_state(config) for _ in range(2)]

    def body(comm: Communicator) -> list[list[bool]]:
        found = []
        for _ in range(3):
            state = states[comm.rank]
            wanted_at = state.step + 2
            wanted = lambda state=state, at=wanted_at: comm.rank == 0 and state.step + 1 == at  # noqa: E731
            infos = list(make_trainer(config, wanted).steps(state, Mesh(comm)))
            found.append([info.stop_requested for info in infos])
        return found

    # Wanted in steps 2, 6 and 10; where the state is looked at, as after 5 and 10, all hear of it at once.
    said = [[False, False, False, True], [False, False, False, True], [False, True]]
    assert on_ranks(2, body) == [said] * 2
