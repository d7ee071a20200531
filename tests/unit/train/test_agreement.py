from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from train_samples import CONFIG, make_state, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.errors import CommError, DataError
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.agreement import broadcast_bytes, check_same, synchronise
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState

SIZES = [1, 2, 3]


def counters(state: TrainState) -> tuple[int, int, int]:
    return state.step, state.num_tokens, state.num_skipped


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("data", [b"x", b"", bytes(range(256)) * 40_000], ids=len)
def test_the_bytes_of_rank_0_reach_everybody(size: int, data: bytes) -> None:
    def body(comm: Communicator) -> bytes:
        return broadcast_bytes(None if comm.rank else data, comm, "a test")

    assert on_ranks(size, body) == [data] * size


@pytest.mark.parametrize("size", SIZES)
def test_equal_facts_are_agreed_on(size: int) -> None:
    assert on_ranks(size, lambda comm: check_same({"data": "d" * 64, "seed": "1"}, comm)) == [None] * size


@pytest.mark.parametrize("odd", [1, 2])
@pytest.mark.parametrize("changes", [{"model": "f" * 64}, {"model": None}])
def test_every_rank_names_the_one_that_differs_and_in_what(odd: int, changes: dict[str, str | None]) -> None:
    def body(comm: Communicator) -> None:
        facts = {"data": "d" * 64, "model": "e" * 64} | (changes if comm.rank == odd else {})
        check_same({name: value for name, value in facts.items() if value is not None}, comm)

    errors = run_ranks(3, body)
    # Who is first to see it leaves, which may be what another one, still waiting, hears of first.
    assert {DataError} <= {type(error) for error in errors} <= {DataError, CommError}
    for error in errors:
        assert f"worker {odd} has another model than worker 0 ({str(changes['model'])[:16]} and eeeeeeee" in str(error)
        assert "\n" not in str(error)


def test_synchronising_gives_every_rank_the_state_of_rank_0() -> None:
    states = [make_state(seed=rank) for rank in range(3)]
    trained = states[0]
    gradients = {name: mx.ones(array.shape) for name, array in trained.parameters.items()}
    trained.commit(make_optimizer(CONFIG), gradients, mx.array(1.0), 1e-2, num_tokens=2**40)
    trained.skip()
    expected = trained.digest()

    def body(comm: Communicator) -> tuple[dict[str, str], tuple[int, int, int]]:
        synchronise(states[comm.rank], comm)
        return states[comm.rank].digest(), counters(states[comm.rank])

    assert on_ranks(3, body) == [(expected, (2, 2**40, 1))] * 3


@pytest.mark.parametrize("name", ["step", "num_tokens", "num_skipped"])
def test_a_counter_alone_is_reason_enough(name: str) -> None:
    states = [make_state(), replace(make_state(), **{name: 3})]

    def body(comm: Communicator) -> tuple[int, int, int]:
        synchronise(states[comm.rank], comm)
        return counters(states[comm.rank])

    assert on_ranks(2, body) == [(0, 0, 0)] * 2


def test_the_figures_of_rank_0_are_everywhere() -> None:
    states = [make_state() for _ in range(2)]
    states[0].metrics, states[1].metrics = {"eval/loss": 0.1 + 0.2}, {"eval/loss": 7.0}
    on_ranks(2, lambda comm: synchronise(states[comm.rank], comm))
    assert [state.metrics for state in states] == [{"eval/loss": 0.1 + 0.2}] * 2


def test_where_all_are_equal_nothing_is_sent_anew() -> None:
    states = [make_state() for _ in range(2)]
    arrays = [state.parameters["head.weight"] for state in states]
    on_ranks(2, lambda comm: synchronise(states[comm.rank], comm))
    assert all(state.parameters["head.weight"] is array for state, array in zip(states, arrays, strict=True))


def test_one_alone_agrees_with_itself() -> None:
    state = make_state()
    before = state.digest()
    synchronise(state, LocalComm())
    assert state.digest() == before
