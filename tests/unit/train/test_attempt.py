"""A step that is begun by one group and finished by another has the bits of a step that nothing happened to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_samples import CONFIG, make_plan, make_rows, make_state, make_trainer, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.tree_sum import Node, cover
from mlx_distributed.errors import CommError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train.attempt import Attempt, quick_digest
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.step_info import StepInfo

NUM_LEAVES = 5


def phases() -> Phases:
    rows = make_rows()
    return Phases(CONFIG, make_plan(rows), rows)


def timeless(info: StepInfo) -> StepInfo:
    return replace(info, step_s=0.0, data_s=0.0, comm_s=0.0, comm_exposed_s=0.0, sent_bytes=0)


def undisturbed(dropout: float) -> tuple[StepInfo, dict[str, str]]:
    state = make_state(dropout=dropout)
    return timeless(make_trainer().train_step(state, Mesh(LocalComm()))), state.digest()


class Dying(LocalComm):
    """A group that fails when so many micro-batches are computed, or when all are."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def check(self, what: str) -> None:
        self._left -= 1
        if not self._left:
            raise CommError(what, None, 0, 0.0, "died")

    def start_all_reduce(self, layout, num_leaves, buckets, what, feedback=None):  # type: ignore[no-untyped-def]
        list(buckets)
        raise CommError(what, None, 0, 0.0, "died at the end")


@pytest.mark.parametrize("after", [1, 2, 3, 4, 9])
def test_what_was_computed_before_a_failure_is_kept(after: int) -> None:
    expected = undisturbed(0.3)
    state = make_state(dropout=0.3)
    attempt = Attempt(phases(), state)
    assert (attempt.num_leaves, attempt.held, attempt.speed) == (NUM_LEAVES, (), 0.0)
    with pytest.raises(CommError, match="died"):
        attempt.reduce(range(4), Dying(after))
    num_held = min(after, 4)
    assert attempt.held == tuple(cover(0, num_held, NUM_LEAVES))
    assert state.digest() == make_state(dropout=0.3).digest()
    attempt.reduce(range(num_held, NUM_LEAVES), LocalComm())
    assert attempt.held == ((0, NUM_LEAVES),)
    assert attempt.speed > 0
    assert (timeless(attempt.commit()), state.digest()) == expected


@pytest.mark.parametrize(
    "before", [((0, 2), (2, 5)), ((0, 5), ()), ((3, 5), (0, 1)), ((), ()), ((0, 4), (0, 4))], ids=str
)
def test_members_put_in_what_each_of_them_has(before: Sequence[Sequence[int]]) -> None:
    """Each range was computed by one of two ranks, for a group that has failed; where both have it, one forgets it."""
    expected, states = undisturbed(0.3), [make_state(dropout=0.3) for _ in range(2)]

    def body(comm: Communicator) -> tuple[StepInfo, dict[str, str], str]:
        state, mine = states[comm.rank], before[comm.rank]
        attempt = Attempt(phases(), state)
        if mine:
            with pytest.raises(CommError):
                attempt.reduce(range(*mine), Dying(9))
        keep: tuple[Node, ...] = attempt.held
        if comm.rank and mine == before[0]:
            keep = ()
        attempt.keep(keep)
        assert attempt.held == keep
        done = {leaf for edges in before if edges for leaf in range(*edges)}
        missing = [leaf for leaf in range(NUM_LEAVES) if leaf not in done]
        half = (len(missing) + 1) // 2
        digest = attempt.reduce(missing[:half] if comm.rank == 0 else missing[half:], comm)
        return timeless(attempt.commit()), state.digest(), digest

    (info, state, digest), other = on_ranks(2, body)
    assert (info, state, digest) == other
    assert (info, state) == expected


def test_a_digest_is_that_of_the_sums() -> None:
    first, second = (Attempt(phases(), make_state()) for _ in range(2))
    assert first.reduce(range(NUM_LEAVES), LocalComm()) == second.reduce(range(NUM_LEAVES), LocalComm())
    assert quick_digest(first.sums) == quick_digest(second.sums)
    first.commit()
    assert first.sums == {}


def test_a_state_that_others_have_a_part_of_is_not_attempted() -> None:
    state: TrainState = make_state()
    state.inner = object()  # type: ignore[assignment]
    with pytest.raises(AssertionError):
        Attempt(phases(), state)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 9000), place=st.integers(0, 10**6), bit=st.integers(0, 31))
def test_any_other_bit_gives_another_digest(size: int, place: int, bit: int) -> None:
    words = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    arrays = {"a": mx.array(words).view(mx.float32), "b": mx.ones(3), "c": mx.array(7, mx.uint64)}
    same = {name: mx.array(array) for name, array in reversed(arrays.items())}
    assert quick_digest(arrays) == quick_digest(same)
    if size:
        words[place % size] ^= np.uint32(1 << bit)
        assert quick_digest(arrays | {"a": mx.array(words).view(mx.float32)}) != quick_digest(arrays)
    swapped = {"a": arrays["b"], "b": arrays["a"], "c": arrays["c"]}
    assert size in (1, 3) or quick_digest(swapped) != quick_digest(arrays)
