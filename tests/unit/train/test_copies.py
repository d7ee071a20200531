"""Workers' own copies, handed out after a resume: each its own, or the mean where there are more or fewer workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_unflatten
from train_samples import CONFIG, TinyModel, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.config.schema import DilocoConfig
from mlx_distributed.errors import CheckpointError, CommError
from mlx_distributed.parallel.adamw import STEP
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.checkpoint.segments import COPY
from mlx_distributed.train.copies import hand_out, named
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.state import Inner, TrainState, digest

FRAGMENTS = 2
PARALLEL = replace(CONFIG.parallel, sync="diloco", diloco=DilocoConfig(fragments=FRAGMENTS))
DILOCO = replace(CONFIG, parallel=PARALLEL)


def make_state(seed: int = 0) -> TrainState:
    mx.random.seed(seed)
    state = init_state(TinyModel(), DILOCO, LocalComm())
    mx.eval(state.parameters, state.optimizer, inner_of(state).state.optimizer)
    return state


def inner_of(state: TrainState) -> Inner:
    assert state.inner is not None
    return state.inner


def make_copy(seed: int, num_tokens: int, *exchanged_at: int, step: int = 9, num_updates: int = 8) -> Arrays:
    """Of a worker that has trained on so much: random parameters and moments."""
    inner, rng = inner_of(make_state()), np.random.default_rng(seed)
    own = inner.state
    random = lambda array: mx.array(rng.random(array.shape, np.float32))  # noqa: E731
    own.model.update(tree_unflatten([(name, random(array)) for name, array in own.parameters.items()]))
    own.optimizer = {name: random(array) for name, array in own.optimizer.items()}
    own.optimizer[STEP] = mx.array(num_updates, mx.uint64)
    own.step, own.num_tokens, own.num_skipped = step, num_tokens, seed
    inner.exchanged_at = list(exchanged_at)
    copy = named(inner)
    mx.eval(copy)
    return copy


def loaders(copies: Sequence[Arrays]) -> Sequence[Callable[[], Arrays]]:
    return [lambda copy=copy: copy for copy in copies]  # type: ignore[misc]


def handed_out(size: int, copies: Sequence[Arrays]) -> list[Inner]:
    """What the workers of a group have, of which rank 0 has found these copies."""
    states = [make_state() for _ in range(size)]

    def body(comm: Communicator) -> Inner:
        hand_out(states[comm.rank], loaders(copies) if comm.rank == 0 else [], comm)
        comm.barrier("the end")
        return inner_of(states[comm.rank])

    return on_ranks(size, body)


def test_all_of_it_is_named_as_a_copy() -> None:
    copy = make_copy(1, 70, 50, 60)
    assert all(name.startswith(COPY) for name in copy)
    assert copy[f"{COPY}counters"].tolist() == [9, 70, 1, 50, 60]
    parameters = inner_of(make_state()).state.parameters
    assert len(copy) == 3 * len(parameters) + 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_as_many_workers_get_each_their_own(size: int) -> None:
    copies = [make_copy(rank, 100 + rank, 10 * rank, 7) for rank in range(size)]
    for copy, inner in zip(copies, handed_out(size, copies), strict=True):
        assert digest(named(inner)) == digest(copy)
        assert (inner.state.step, inner.state.optimizer[STEP].item()) == (9, 8)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_where_nothing_was_saved_all_begin_with_what_they_agree_on(size: int) -> None:
    states = [make_state() for _ in range(size)]
    restored = make_state(seed=5).parameters
    for state in states:  # as a resume does, from a run that agreed in every step
        state.model.update(tree_unflatten(list(restored.items())))

    def body(comm: Communicator) -> tuple[str, list[int]]:
        hand_out(states[comm.rank], [], comm)
        inner = inner_of(states[comm.rank])
        return digest(inner.state.parameters), inner.exchanged_at

    assert on_ranks(size, body) == [(digest(restored), [0] * FRAGMENTS)] * size


@pytest.mark.parametrize(("saved_by", "size"), [(3, 1), (2, 1), (3, 2), (2, 3), (1, 3)])
def test_more_or_fewer_workers_get_the_mean(saved_by: int, size: int) -> None:
    num_tokens = [100, 300, 40][:saved_by]
    num_updates = [8, 11, 3][:saved_by]
    copies = [
        make_copy(rank, num, num - 30, num - 10 * rank, step=9 + rank, num_updates=updates)
        for rank, (num, updates) in enumerate(zip(num_tokens, num_updates, strict=True))
    ]
    first, *others = handed_out(size, copies)
    assert {digest(named(other)) for other in others} <= {digest(named(first))}
    found = named(first)
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        name: (array.dtype, array.shape) for name, array in copies[0].items()
    }
    for name in found:
        if name not in (f"{COPY}counters", f"{COPY}optimizer/{STEP}"):
            mean = np.average([np.asarray(copy[name], np.float64) for copy in copies], axis=0, weights=num_tokens)
            np.testing.assert_allclose(np.asarray(found[name]), mean, rtol=0, atol=1e-6)
    assert first.state.optimizer[STEP].item() == max(num_updates)
    assert (first.state.step, first.state.num_skipped) == (8 + saved_by, 0)
    assert first.state.num_tokens == sum(num_tokens) // size
    since = [first.state.num_tokens - at for at in first.exchanged_at]
    assert since == [30 * saved_by // size, 10 * sum(range(saved_by)) // size]


COUNTS = st.integers(1, 1 << 45).flatmap(
    lambda num: st.tuples(st.just(num), *[st.integers(0, num) for _ in range(FRAGMENTS)])
)


@settings(deadline=None, max_examples=30)
@given(st.lists(COUNTS, min_size=2, max_size=5))
def test_no_token_since_an_exchange_is_lost(counters: list[tuple[int, ...]]) -> None:
    copies = [make_copy(rank, *of_rank) for rank, of_rank in enumerate(counters)]
    (inner,) = handed_out(1, copies)
    assert inner.state.num_tokens == sum(num for num, *_ in counters)
    for fragment, at in enumerate(inner.exchanged_at):
        assert at >= 0
        assert inner.state.num_tokens - at == sum(num - exchanged[fragment] for num, *exchanged in counters)


def test_workers_that_have_trained_on_nothing_count_alike() -> None:
    """As after a first step whose loss was not finite."""
    copies = [make_copy(rank, 0, 0, 0, num_updates=0) for rank in range(2)]
    (inner,) = handed_out(1, copies)
    found = named(inner)
    for name in (name for name in found if name.startswith(f"{COPY}parameters/")):
        mean = (np.asarray(copies[0][name]) + np.asarray(copies[1][name])) / 2
        np.testing.assert_allclose(np.asarray(found[name]), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("saved_by", [2, 3])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters/head.weight": None}, "parameters/head.weight is missing in the checkpoint and"),
        ({"parameters/tail.weight": mx.zeros(1)}, "parameters/tail.weight is (mlx.core.float32, (1,)) in the"),
        ({"optimizer/norm.bias.v": mx.zeros(9)}, "optimizer/norm.bias.v is (mlx.core.float32, (9,)) in the"),
        ({"parameters/norm.bias": mx.zeros(8, mx.float16)}, "parameters/norm.bias is (mlx.core.float16, (8,)) in"),
        ({"counters": mx.zeros(4, mx.int64)}, "counters is (mlx.core.int64, (4,)) in the checkpoint and"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_copy_that_does_not_fit_is_refused_by_name(
    changes: dict[str, mx.array | None], said: str, saved_by: int
) -> None:
    copies = [make_copy(rank, 100, 50, 50) for rank in range(saved_by)]
    spoilt = copies[1] | {f"{COPY}{name}": array for name, array in changes.items() if array is not None}
    copies[1] = {name: a for name, a in spoilt.items() if changes.get(name.removeprefix(COPY), a) is not None}
    states = [make_state() for _ in range(2)]
    before = digest(named(inner_of(states[0])))

    def body(comm: Communicator) -> None:
        hand_out(states[comm.rank], loaders(copies) if comm.rank == 0 else [], comm)

    refused, other = run_ranks(2, body)
    assert isinstance(refused, CheckpointError)
    assert str(refused).startswith("a worker's own copy does not fit: ")
    assert said in str(refused)
    assert "\n" not in str(refused)
    assert isinstance(other, CommError)
    assert digest(named(inner_of(states[0]))) == before
