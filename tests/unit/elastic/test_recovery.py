"""A newcomer gets the state of others while they train, over real endpoints on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import mlx.core as mx
import numpy as np
import pytest
from elastic_recovery import (
    MINE,
    TOKEN,
    Trainer,
    assert_leads_to,
    assert_same,
    fetch,
    newcomer,
    outcome_of,
    running,
    small_slices,
    state_after,
    sums_of,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.tls import Identity
from mlx_distributed.elastic.protocol import NOTHING, START, Outcome
from mlx_distributed.elastic.recovery import NotReceived, fetch_state
from mlx_distributed.elastic.snapshots import SLICE_BYTES, Slices, Snapshot, StateServer

__all__ = ["newcomer", "small_slices"]

DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.uint64, np.int32, np.uint8, np.bool_]).map(np.dtype)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=40))


def view(array: mx.array) -> np.ndarray:
    """Of an array of MLX, as a trainer publishes it."""
    mx.eval(array)
    return np.asarray(array)


@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=5), st.integers(1, 64))
def test_slices_put_together_are_the_arrays(arrays: Mapping[str, np.ndarray], slice_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_distributed.elastic.snapshots.SLICE_BYTES", slice_bytes)
        there = Slices(arrays)
        copies = {name: np.empty(array.shape, array.dtype) for name, array in arrays.items()}
        here = Slices(copies)
        for number in reversed(range(len(there))):
            data = there.get(number)
            assert 0 < len(data) <= slice_bytes
            assert here.put(number, data, hashlib.sha256(data).digest())
        assert_same(copies, arrays)


def test_a_slice_that_does_not_fit_is_not_written() -> None:
    arrays = {"w": np.ones(3, np.float32)}
    slices = Slices(arrays)
    for data in (b"", bytes(11), bytes(13)):
        assert not slices.put(0, data, hashlib.sha256(data).digest())
    assert not slices.put(0, bytes(12), hashlib.sha256(b"other").digest())
    assert (arrays["w"] == 1).all()


def test_every_kind_of_array_arrives_bit_for_bit(newcomer: Endpoint) -> None:
    rng = np.random.default_rng(0)
    weights = mx.array(rng.standard_normal((1000, 700), np.float32))
    arrays = {
        "weights": view(weights),
        "transposed": view(weights).T,
        "empty": view(mx.zeros((0, 3))),
        "step": view(mx.array(np.array(2**63 + 5, np.uint64))),
        "tokens": view(mx.array(np.array([-(2**62), 1]))),
        "not numbers": np.array([0x7FC01234, 0xFF800000, 0x80000000], np.uint32).view(np.float32),
        "x" * 1000: np.float32(3.5).reshape(()),
    }
    assert arrays["weights"].nbytes > 2 * SLICE_BYTES
    server, outcome = StateServer(TOKEN), Outcome(3, "d")
    server.publish(Snapshot(outcome, {"num_tokens": 2**40, "num_skipped": 0}, arrays))
    mine = {name: np.zeros_like(array, order="C") for name, array in arrays.items()}
    source = Endpoint(handlers=server.handlers)
    counters = {"num_tokens": 0, "num_skipped": 0}
    received = fetch_state(newcomer, [source.address], outcome, Snapshot(NOTHING, counters, mine), lambda _: {}, TOKEN)
    source.close()
    assert received.state is not None
    assert received.later == ()
    assert received.state.outcome == outcome
    assert received.state.counters == {"num_tokens": 2**40, "num_skipped": 0}
    assert_same(received.state.arrays, arrays)
    received.state.arrays["weights"][0] = 0  # It is ours now.


def test_a_state_of_nothing_can_be_had(newcomer: Endpoint) -> None:
    server = StateServer(TOKEN)
    server.publish(Snapshot(START, {}, {}))
    source = Endpoint(handlers=server.handlers)
    received = fetch_state(newcomer, [source.address], START, Snapshot(NOTHING, {}, {}), lambda _: {}, TOKEN)
    source.close()
    assert received.state == Snapshot(START, {}, {})


def test_three_sources_share_the_work(newcomer: Endpoint, small_slices: None) -> None:
    all_asked = threading.Barrier(3)

    async def together(trainer: Trainer, data: bytes) -> bytes:
        if trainer.num_slices == 1:
            await asyncio.to_thread(all_asked.wait, 20)
        return data

    sources = [Trainer(4, on_slice=together) for _ in range(3)]
    with running(*sources):
        received = fetch(newcomer, sources, 4)
    assert_leads_to(received, 4)
    assert all(source.num_slices > 0 for source in sources)
    assert sum(source.num_slices for source in sources) == len(Slices(MINE.arrays)), "none was sent twice"


def test_steps_taken_meanwhile_are_replayed(newcomer: Endpoint, small_slices: None) -> None:
    async def train_on(trainer: Trainer, data: bytes) -> bytes:
        if trainer.num_slices == 10:
            kept.append(trainer.train(3))
        return data

    kept: list[list[bool]] = []
    source = Trainer(4, on_slice=train_on)
    with running(source):
        received = fetch(newcomer, [source], 4)
        assert kept == [[True] * 3]
        assert received.state is not None
        assert received.state.outcome == outcome_of(4)
        assert_same(received.state.arrays, state_after(4).arrays)
        assert [outcome.step for outcome, _ in received.later] == [5, 6, 7]
        assert_leads_to(received, 7)
        # It is told of a step that was taken just before it came in: the gradients of that one are enough.
        source.train()
        mine = state_after(7)
        num_slices = source.num_slices
        received = fetch(newcomer, [source], 8, mine)
        assert received.state is None
        assert_leads_to(received, 8, mine)
        assert source.num_slices - num_slices == len(Slices(sums_of(8)))
        assert fetch(newcomer, [source], 8, state_after(8)).later == (), "there is nothing newer"


def test_the_state_that_most_have_is_taken_from_all_of_those(newcomer: Endpoint, small_slices: None) -> None:
    sources = [Trainer(step) for step in (5, 4, 4)]
    with running(*sources):
        received = fetch(newcomer, sources, 4)
        assert_leads_to(received, 4)
        assert sources[0].num_slices == 0


def test_sources_may_be_ahead_of_each_other_in_gradients(newcomer: Endpoint) -> None:
    sources = [Trainer(4) for _ in range(2)]
    with running(*sources):
        fetch(newcomer, sources, 4)
        for source, num_steps in zip(sources, (3, 1), strict=True):
            source.train(num_steps)
        assert_leads_to(fetch(newcomer, sources, 4, state_after(4)), 7, state_after(4))


def test_who_asks_during_a_commit_gets_the_state_after_it(newcomer: Endpoint) -> None:
    source = Trainer(4)
    with running(source), ThreadPoolExecutor() as pool:
        assert not source.server.release(), "nobody fetches"
        fetching = pool.submit(fetch, newcomer, [source], 4)
        while not source.num_calls:
            pass
        source.server.publish(state_after(5))
        assert_leads_to(fetching.result(20), 5)


def test_two_newcomers_at_once(newcomer: Endpoint, small_slices: None) -> None:
    source, other = Trainer(4), Endpoint()
    with running(source), ThreadPoolExecutor() as pool:
        for received in pool.map(lambda end: fetch(end, [source], 4), (newcomer, other)):
            assert_leads_to(received, 4)
        source.train(2)
        assert_leads_to(fetch(other, [source], 6), 6)
    other.close()


def test_over_tls(small_slices: None) -> None:
    identity, stranger = (Identity.create(datetime.now(UTC)) for _ in range(2))
    source = Trainer(4, identity)
    with running(source):
        ends = [Endpoint(identity=each) for each in (identity, stranger, None)]
        assert_leads_to(fetch(ends[0], [source], 4), 4)
        for end in ends[1:]:
            with pytest.raises(NotReceived, match=source.address):
                fetch(end, [source], 4)
        for end in ends:
            end.close()


def test_what_nobody_fetches_is_not_kept() -> None:
    trainer = Trainer(4)
    with running(trainer):
        assert trainer.train(3) == [False] * 3


def test_nothing_is_copied_to_publish_it(newcomer: Endpoint) -> None:
    array = np.zeros_like(MINE.arrays["w"])
    server, outcome = StateServer(TOKEN), outcome_of(4)
    server.publish(Snapshot(outcome, {}, {"w": array}))
    array += 1  # Nobody may, but what comes is then what is there now.
    source, mine = Endpoint(handlers=server.handlers), Snapshot(NOTHING, {}, {"w": np.empty_like(array)})
    received = fetch_state(newcomer, [source.address], outcome, mine, lambda _: {}, TOKEN)
    source.close()
    assert received.state is not None
    assert_same(received.state.arrays, {"w": array})
