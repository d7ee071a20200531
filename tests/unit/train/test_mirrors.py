"""Moments that are on two workers each: groups change between steps, and nothing is lost but what both had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sharded import SHARDED, make_save, make_state
from train_samples import CONFIG, NUM_STEPS, make_plan, make_rows, make_trainer, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import BLOCK
from mlx_distributed.comm.reduction import slices
from mlx_distributed.errors import CommError, TrainingError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import run_ranks
from mlx_distributed.train import attempts
from mlx_distributed.train.attempt import Attempt
from mlx_distributed.train.mirrors import Move, Slices, forget, plan_moves
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState, digest


def make_phases() -> Phases:
    rows = make_rows()
    return Phases(SHARDED, make_plan(rows, SHARDED), rows)


def undisturbed(num_steps: int) -> TrainState:
    """The state of a replicated optimizer after so many steps on one worker."""
    state, trainer = make_state(LocalComm(), CONFIG), make_trainer()
    for _ in range(num_steps):
        trainer.train_step(state, Mesh(LocalComm()))
    return state


def take_steps(state: TrainState, comm: Communicator, num_steps: int) -> None:
    """Enter a group and take steps in it, as a member of an elastic run does."""
    phases = make_phases()
    attempts.enter(phases, state, comm)
    for _ in range(num_steps):
        attempt = attempts.begin(phases, state)
        leaves = range(comm.rank, attempt.num_leaves, comm.size)
        agreed = comm.all_gather(mx.array([int(attempt.reduce(leaves, comm)[:8], 16)]), "the digests")
        assert len({digest.item() for digest in agreed}) == 1
        attempt.settle()
        attempt.commit()


def in_group(states: Sequence[TrainState], num_steps: int) -> None:
    on_ranks(len(states), lambda comm: take_steps(states[comm.rank], comm, num_steps))


def moments(states: Sequence[TrainState]) -> dict[str, mx.array]:
    """Whole, from what the ranks of a group own."""
    whole: dict[str, mx.array] = {}
    for name in states[0].parameters:
        for moment in ("m", "v"):
            pieces = []
            for state in states:
                own = state.parts[0]
                if name in own.shard.ranges:
                    pieces.append((own.shard.ranges[name], own.moments[f"{name}.{moment}"]))
            pieces.sort(key=lambda piece: piece[0])
            flat = mx.concatenate([piece for _, piece in pieces])
            whole[f"{name}.{moment}"] = flat.reshape(states[0].parameters[name].shape)
    return whole | {"step": states[0].optimizer["step"]}


def assert_undisturbed(states: Sequence[TrainState]) -> None:
    expected = undisturbed(states[0].step)
    for state in states:
        assert digest(state.parameters) == digest(expected.parameters)
        assert (state.step, state.num_tokens) == (expected.step, expected.num_tokens)
    assert digest(moments(states)) == digest(expected.optimizer)


def fresh() -> TrainState:
    return make_state(LocalComm(), SHARDED)


def behind(other: TrainState) -> TrainState:
    """Of a worker that has been given the state of a run, without moments."""
    state = fresh()
    forget(state)
    shared = {"step": other.optimizer["step"]}
    state.restore(other.parameters, shared, other.step, other.num_tokens, other.num_skipped)
    return state


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_member_is_lost_and_another_comes(lost: int) -> None:
    states = [fresh() for _ in range(3)]
    in_group(states, 2)
    assert_undisturbed(states)
    del states[lost]
    in_group(states, 2)
    assert_undisturbed(states)
    states.insert(lost, behind(states[0]))
    in_group(states, 2)
    assert_undisturbed(states)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0], [0]], ids=str)
def test_the_same_members_in_another_order(order: list[int]) -> None:
    states = [fresh() for _ in range(3)]
    in_group(states, 2)
    states = [states[rank] for rank in order]
    if len(order) == 1:
        with pytest.raises(TrainingError, match="both were lost at once; --resume goes on from the last checkpoint"):
            in_group(states, 1)
    else:
        in_group(states, 3)
        assert_undisturbed(states)


def test_each_has_its_part_and_the_mirror_of_another() -> None:
    states = [fresh() for _ in range(3)]
    in_group(states, 1)
    whole = sum(array.nbytes for name, array in undisturbed(1).optimizer.items() if name != "step")
    for state in states:
        held = sum(array.nbytes for part in state.parts for array in part.moments.values())
        assert held <= 2 * (whole / 3 + 3 * 2 * 4 * BLOCK)
    for rank, state in enumerate(states):
        _, mirror = state.parts
        owner = states[rank - 1].parts[0]
        assert mirror.shard == owner.shard
        assert digest(mirror.moments) == digest(owner.moments)


@pytest.mark.parametrize(
    ("rank", "call"), [(1, "all_gather"), (1, "send"), (0, "recv"), (0, "barrier"), (1, "barrier")]
)
def test_a_group_that_fails_while_moments_are_on_their_way_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, rank: int, call: str
) -> None:
    states = [fresh() for _ in range(3)]
    in_group(states, 2)
    states = [behind(states[0]), *states[1:]]
    phases = make_phases()

    def fail(*_: object) -> None:
        raise CommError(call, None, 0, 0.0, "failed")

    def body(comm: Communicator) -> None:
        if comm.rank == rank:
            monkeypatch.setattr(comm, call, fail)
        attempts.enter(phases, states[comm.rank], comm)

    assert isinstance(run_ranks(3, body)[rank], CommError)
    in_group(states, 2)
    assert_undisturbed(states)
    assert all(len(state.parts) == 2 for state in states)


def test_a_step_that_is_retried_in_another_group() -> None:
    states = [fresh() for _ in range(3)]
    in_group(states, 1)
    phases = make_phases()

    def body(comm: Communicator) -> Attempt:
        attempts.enter(phases, states[comm.rank], comm)
        attempt = attempts.begin(phases, states[comm.rank])
        leaves = range(comm.rank, attempt.num_leaves, comm.size)
        attempt.reduce(leaves, comm)
        return attempt

    first, _, third = on_ranks(3, body)
    left = [(states[0], first), (states[2], third)]
    held = [attempt.held for _, attempt in left]

    def again(comm: Communicator) -> None:
        state, attempt = left[comm.rank]
        attempts.enter(phases, state, comm)
        missing = [leaf for leaf in range(attempt.num_leaves) if leaf % 3 == 1]
        attempt.keep(held[comm.rank])
        attempt.reduce(missing if comm.rank else [], comm)
        attempt.commit()

    on_ranks(2, again)
    assert_undisturbed([states[0], states[2]])


def test_the_vote_of_before_may_still_be_committed() -> None:
    """All have voted and what they hold has changed since: then it is heard that the step stands."""
    states = [fresh() for _ in range(3)]
    in_group(states, 1)
    phases = make_phases()

    def body(comm: Communicator) -> None:
        state = states[comm.rank]
        attempts.enter(phases, state, comm)
        attempt = attempts.begin(phases, state)
        attempt.reduce(range(comm.rank, attempt.num_leaves, comm.size), comm)
        forget(state)
        attempt.commit()

    on_ranks(3, body)
    assert_undisturbed(states)


def test_a_step_that_is_not_finite_is_skipped_and_retold() -> None:
    def spoilt() -> TrainState:
        state = fresh()
        weight = state.model.embed.weight
        state.model.embed.weight = mx.concatenate([weight[:-1], mx.full((1, 8), math.nan)])
        mx.eval(state.parameters)
        return state

    phases, observer = make_phases(), spoilt()

    def body(comm: Communicator) -> list[str | None]:
        state, found = spoilt(), []
        attempts.enter(phases, state, comm)
        for _ in range(NUM_STEPS):
            attempt = attempts.begin(phases, state)
            attempt.reduce(range(comm.rank, attempt.num_leaves, comm.size), comm)
            if comm.rank == 0:
                empty = attempts.empty_sums(phases, observer, state.step)
                assert {n: (a.dtype, a.shape) for n, a in attempt.sums.items()} == {
                    n: (a.dtype, a.shape) for n, a in empty.items()
                }
                attempts.replay(phases, observer, dict(attempt.sums))
            found.append(attempt.commit().skipped)
        if comm.rank == 0:
            assert observer.digest() == state.digest()
            assert (observer.step, observer.num_skipped) == (state.step, state.num_skipped)
        return found

    first, second = on_ranks(2, body)
    assert first == second
    assert 0 < sum(skipped is not None for skipped in first) < NUM_STEPS


def test_who_is_left_alone_saves_only_what_is_whole(tmp_path: Path) -> None:
    states = [fresh() for _ in range(3)]
    in_group(states, 2)
    save = make_save(tmp_path, LocalComm(), states[0], SHARDED)
    save(states[0])
    assert not list(tmp_path.iterdir())
    states = [fresh()]
    in_group(states, 2)
    save = make_save(tmp_path, LocalComm(), states[0], SHARDED)
    save(states[0])
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000002"]


SIZES = [4 * BLOCK + 17, 40, 9 * BLOCK]


@given(
    groups=st.lists(st.permutations(range(4)).flatmap(lambda p: st.integers(1, 4).map(lambda n: p[:n])), max_size=4),
    shares=st.lists(st.floats(0.1, 1.0), min_size=4, max_size=4),
)
def test_moves_give_everybody_what_it_wants(groups: list[list[int]], shares: list[float]) -> None:
    """Four workers, of which some are in each group; who is not in a group has nothing after it."""
    group = [0, 1, 2, 3]
    has = dict(zip(group, wanted_by(group, shares), strict=True))
    for group in groups:
        wanted = wanted_by(group, shares)
        held = [has.get(worker, []) for worker in group]
        moves = plan_moves(held, wanted)
        anywhere = [blocks_of(slices) for mine in held for slices in mine]
        whole = set().union(*anywhere) == blocks_of(tuple((0, num) for num in SIZES))
        assert (moves is not None) == whole
        for rank, mine in enumerate(held):
            given = [move for move in moves or [] if move.target == rank]
            for move in given:
                assert move.source != rank
                assert any(blocks(move) <= blocks_of(slices) for slices in held[move.source])
                assert not any(blocks(move) & blocks_of(slices) for slices in mine)
            assert len(set().union(*map(blocks, given))) == sum(len(blocks(move)) for move in given)
            if moves is not None:
                now = set().union(*map(blocks, given), *map(blocks_of, mine))
                assert set().union(*map(blocks_of, wanted[rank])) <= now
        has = dict(zip(group, wanted, strict=True))


def wanted_by(group: Sequence[int], shares: Sequence[float]) -> list[list[Slices]]:
    total = sum(shares[worker] for worker in group)
    by_bucket = [slices(num, [shares[worker] / total for worker in group], i) for i, num in enumerate(SIZES)]
    owned: list[Slices] = [tuple(bucket[rank] for bucket in by_bucket) for rank in range(len(group))]
    return [[owned[rank], owned[rank - 1]] if len(group) > 1 else [owned[rank]] for rank in range(len(group))]


def blocks_of(slices: Slices) -> set[tuple[int, int]]:
    """Bucket and number of every block; slices begin and end between blocks."""
    return {(bucket, at // BLOCK) for bucket, (start, stop) in enumerate(slices) for at in range(start, stop, BLOCK)}


def blocks(move: Move) -> set[tuple[int, int]]:
    return {(move.bucket, at // BLOCK) for at in range(move.start, move.stop, BLOCK)}


def test_what_is_where_it_belongs_does_not_move() -> None:
    wanted = wanted_by([0, 1, 2], [1.0] * 3)
    assert plan_moves(wanted, wanted) == []
