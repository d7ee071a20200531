from __future__ import annotations

import asyncio
import itertools
from collections import deque

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.comm.buckets import make_layout, to_buckets
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.link_speed import ALIKE, UNKNOWN, LinkSpeed, both_ways, levelled, to_measure
from mlx_distributed.comm.probe import FIRST_BYTES, MAX_BYTES, Flow, counted
from mlx_distributed.comm.reduction import ownership
from mlx_distributed.errors import CommError
from mlx_distributed.testing import run_ranks

BANDWIDTHS = st.lists(st.floats(1e3, 1e10), min_size=1, max_size=9)


@given(BANDWIDTHS)
def test_noise_makes_no_difference_and_all_else_does(bandwidths: list[float]) -> None:
    found = levelled(bandwidths)
    assert sum(found) == pytest.approx(sum(bandwidths))
    for (before, after), (other_before, other_after) in itertools.combinations(zip(bandwidths, found, strict=True), 2):
        assert (after - other_after) * (before - other_before) >= 0  # nobody overtakes another one
        assert after == pytest.approx(other_after) or max(before, other_before) > min(before, other_before)
    assert all(
        before / ALIKE <= after * (1 + 1e-9) <= before * ALIKE**2
        for before, after in zip(bandwidths, found, strict=True)
    )
    if max(bandwidths) <= ALIKE * min(bandwidths):
        assert len(set(found)) == 1


def test_figures_of_real_links() -> None:
    assert levelled([944.0, 961.0, 186.0]) == [952.5, 952.5, 186.0]
    assert ownership(levelled([951.0, 838.0, 967.0])) == pytest.approx([1 / 3] * 3)
    assert both_ways(940.0, 520.0) == both_ways(520.0, 940.0) == 940.0
    assert both_ways(100.0, 20.0) == both_ways(20.0, 100.0) == 20.0


@given(st.lists(st.sampled_from([0.0, 20.0, 100.0, 1000.0]), min_size=2, max_size=6))
def test_who_is_measured(bandwidths: list[float]) -> None:
    measured = to_measure(bandwidths)
    assert measured == sorted(set(measured))
    assert {rank for rank, bandwidth in enumerate(bandwidths) if not bandwidth} <= set(measured)
    assert bool(measured) == (0.0 in bandwidths)


@pytest.mark.parametrize(
    ("bandwidths", "measured"),
    [
        ([0.0, 0.0, 0.0], [0, 1, 2]),
        ([100.0, 100.0, 20.0], []),  # somebody was lost
        ([100.0, 100.0, 100.0, 0.0], [3]),  # a newcomer
        ([100.0, 20.0, 20.0, 0.0], [0, 3]),  # the first may give more: the others did not take it
        ([20.0, 20.0, 0.0], [0, 1, 2]),
    ],
)
def test_those_may_give_more_that_gave_all_that_the_others_took(bandwidths: list[float], measured: list[int]) -> None:
    assert to_measure(bandwidths) == measured


def total_of(comm: GrpcComm) -> bytes:
    values = np.random.default_rng(comm.rank).standard_normal(300_000).astype(np.float32)
    arrays = {"a": mx.array(values)}
    layout = make_layout(arrays)
    ((total,),) = comm.all_reduce(layout, comm.size, [{(comm.rank, comm.rank + 1): to_buckets(layout, arrays)[0]}], "x")
    return np.asarray(total).tobytes()


def test_all_ranks_know_the_same_of_a_link_and_the_sum_stays_the_same() -> None:
    def body(comm: GrpcComm) -> tuple[bytes, list[LinkSpeed], bytes]:
        before, links = total_of(comm), comm.measure_links([0, 2])
        comm.share_by([links[0].bytes_per_s, links[0].bytes_per_s / 3, links[2].bytes_per_s / 2])
        return before, links, total_of(comm)

    first, *others = run_ranks(3, body)
    assert not isinstance(first, BaseException), first
    assert others == [first, first]
    before, links, after = first
    assert before == after
    assert links[1] == UNKNOWN
    for link in (links[0], links[2]):
        assert 1e6 < link.bytes_per_s < 1e11
        assert 1e-6 < link.round_trip_s < 10


@pytest.mark.parametrize("said", [b"", b"NaN", b"Infinity", b"-1.0", b"[]", b"x" * 99, b"1" + b"0" * 400])
def test_a_peer_that_says_nonsense_has_counted_nothing(said: bytes) -> None:
    assert counted([said]) == 0.0
    assert counted([b"1.5e8"]) == 1.5e8


def test_a_rank_that_is_lost_meanwhile_is_named() -> None:
    def body(comm: GrpcComm) -> list[LinkSpeed]:
        if comm.rank == 1:
            raise RuntimeError("a full disk")
        return comm.measure_links([0, 1])

    error, *_ = run_ranks(2, body)
    assert isinstance(error, CommError)
    assert (error.peer, error.reason) == (1, "a full disk")


@given(st.lists(st.integers(1, MAX_BYTES), min_size=1), st.data())
def test_no_more_is_under_way_than_a_message_and_twice_what_was_read(sizes: list[int], data: st.DataObject) -> None:
    async def body() -> None:
        flow, unread, num_read = Flow(), deque[int](), 0
        flow.read()  # of nothing
        for size in sizes:
            room = asyncio.create_task(flow.room())
            await asyncio.sleep(0)
            while unread and (not room.done() or data.draw(st.booleans())):
                num_read += unread.popleft()
                flow.read()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert room.done()
            assert sum(unread) <= FIRST_BYTES + 2 * num_read
            flow.sent(size)
            unread.append(size)
            assert not flow.ended
        flow.sent(0)
        for _ in range(len(unread) + 3):
            flow.read()
        assert flow.ended

    asyncio.run(body())
