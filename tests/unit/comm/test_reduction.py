"""All ranks of an all_reduce in one thread: frames are delivered by hand, in any order that a network could give."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.comm.reduction import SMALL_BYTES, Outgoing, Reduction, slices
from mlx_distributed.comm.tree_sum import TreeSum
from mlx_distributed.comm.wire import Frame, FrameError, Kind

F32 = np.dtype(np.float32)


class Network:
    """Frames in flight: in order between two ranks, in any order otherwise."""

    def __init__(self, ranks: list[Reduction], rng: random.Random) -> None:
        self.ranks, self.rng = ranks, rng
        self.queues: dict[tuple[int, int], deque[Frame]] = {}

    def post(self, source: int, outgoing: Iterable[Outgoing]) -> None:
        for peer, frame in outgoing:
            self.queues.setdefault((source, peer), deque()).append(frame)

    def deliver_all(self) -> None:
        while busy := [link for link, queue in self.queues.items() if queue]:
            source, peer = link = self.rng.choice(busy)
            self.post(peer, self.ranks[peer].receive(source, self.queues[link].popleft()))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 4),
    num_leaves=st.integers(1, 9),
    elements=st.lists(st.sampled_from([0, 1, 7, 1000, SMALL_BYTES // 4 + 3, 400_001]), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_rank_gets_the_canonical_sum(size: int, num_leaves: int, elements: list[int], seed: int) -> None:
    rng, values = random.Random(seed), np.random.default_rng(seed)
    leaves = [[values.standard_normal(n, np.float32) for n in elements] for _ in range(num_leaves)]
    ranks = [Reduction(1, rank, size, [(n, F32) for n in elements], num_leaves) for rank in range(size)]
    edges = [0, *sorted(rng.randint(0, num_leaves) for _ in range(size - 1)), num_leaves]
    network = Network(ranks, rng)
    for rank, reduction in enumerate(ranks):
        for index in range(len(elements)):
            tree = TreeSum[np.ndarray](num_leaves)
            for i in range(edges[rank], edges[rank + 1]):
                tree.put((i, i + 1), leaves[i][index])
            network.post(rank, reduction.contribute(index, tree.parts))
        network.post(rank, reduction.end())
    network.deliver_all()
    for index in range(len(elements)):
        whole = TreeSum[np.ndarray](num_leaves)
        for i in range(num_leaves):
            whole.put((i, i + 1), leaves[i][index])
        for reduction in ranks:
            assert reduction.done
            assert not reduction.waiting_for()
            assert reduction.take(index).tobytes() == whole.total.tobytes()


def test_slices_share_a_large_bucket_and_give_a_small_one_to_one_rank() -> None:
    assert slices(0, 1_000_000, 4, 3) == [(0, 333_333), (333_333, 666_666), (666_666, 1_000_000)]
    assert slices(4, 10, 4, 3) == [(0, 0), (0, 10), (0, 0)]


def test_waiting_names_the_rank_whose_parts_are_missing_then_the_owner_of_a_result() -> None:
    ranks = [Reduction(1, rank, 3, [(30_000, F32)], 3) for rank in range(3)]
    values = np.ones(30_000, np.float32)
    sent = [[*r.contribute(0, {(rank, rank + 1): values}), *r.end()] for rank, r in enumerate(ranks)]
    assert ranks[0].waiting_for() == {1, 2}

    def deliver(source: int, target: int, frames: list[Outgoing]) -> list[Outgoing]:
        return [out for peer, frame in frames if peer == target for out in ranks[target].receive(source, frame)]

    deliver(1, 0, sent[1])
    assert ranks[0].waiting_for() == {2}
    deliver(2, 0, sent[2])
    assert ranks[0].waiting_for() == {1, 2}
    results = deliver(0, 1, sent[0]) + deliver(2, 1, sent[2])
    deliver(1, 0, results)
    assert ranks[0].waiting_for() == {2}
    assert not ranks[0].done


def part(node: tuple[int, int] = (1, 2), *, bucket: int = 0, chunk: int = 0, num_bytes: int = 40) -> Frame:
    return Frame(Kind.PART, 1, bucket, chunk, *node, b"\0" * num_bytes)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([part(bucket=1)], "bucket 1 of 1"),
        ([part(chunk=1)], "chunk 1 of 1"),
        ([part(num_bytes=41)], "41 bytes"),
        ([part((1, 3))], "not a node"),
        ([part(), part()], "twice"),
        ([part((0, 1))], "twice"),
        ([part((1, 2)), part((2, 3)), part((2, 3))], "complete"),
        ([Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 40)], "chunk 0 of 0"),
        ([Frame(Kind.END, 1), part()], "after its last"),
        ([Frame(Kind.END, 1), Frame(Kind.END, 1)], "twice"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(frames: list[Frame], words: str) -> None:
    reduction = Reduction(1, 0, 2, [(10, F32)], 3)
    list(reduction.contribute(0, {(0, 1): np.zeros(10, np.float32)}))
    *before, last = frames
    for frame in before:
        list(reduction.receive(1, frame))
    with pytest.raises(FrameError, match=words):
        list(reduction.receive(1, last))


def test_leaves_that_nobody_holds_are_an_error_and_not_a_hang() -> None:
    reduction = Reduction(1, 0, 2, [(10, F32)], 3)
    list(reduction.contribute(0, {(0, 1): np.zeros(10, np.float32)}))
    list(reduction.end())
    with pytest.raises(FrameError, match="leaves of the sum are missing"):
        list(reduction.receive(1, Frame(Kind.END, 1)))


def test_a_result_arrives_once() -> None:
    reduction = Reduction(1, 1, 2, [(10, F32)], 1)
    result = Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 40)
    list(reduction.receive(0, result))
    with pytest.raises(FrameError, match="twice"):
        list(reduction.receive(0, result))
