"""All ranks of an all_reduce in one thread: frames are delivered by hand, in any order that a network could give."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.comm.compress import CODECS, Feedback
from mlx_distributed.comm.reduction import DIRECT_BYTES, BucketKind, Outgoing, Reduction, ownership, slices
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
    elements=st.lists(st.sampled_from([0, 1, 7, 1000, DIRECT_BYTES // 4 + 3, 400_001]), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_rank_gets_the_canonical_sum(size: int, num_leaves: int, elements: list[int], seed: int) -> None:
    rng, values = random.Random(seed), np.random.default_rng(seed)
    leaves = [[values.standard_normal(n, np.float32) for n in elements] for _ in range(num_leaves)]
    shares = ownership([rng.uniform(1, 9) for _ in range(size)])
    ranks = [Reduction(1, rank, shares, [BucketKind(n, F32) for n in elements], num_leaves) for rank in range(size)]
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


def test_slices_share_a_bucket() -> None:
    assert slices(1_000_000, ownership([1, 1, 1])) == [(0, 333_333), (333_333, 666_667), (666_667, 1_000_000)]
    assert slices(10, [0.5, 0.0, 0.5]) == [(0, 5), (5, 5), (5, 10)]


@given(st.lists(st.floats(0.1, 1000.0), min_size=3, max_size=9))
def test_ownership_is_the_optimum(bandwidths: list[float]) -> None:
    """No link is busy longer than the mean, unless one would be so by owning nothing."""
    size, shares = len(bandwidths), ownership(bandwidths)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    times = [(1 + (size - 2) * share) / bandwidth for share, bandwidth in zip(shares, bandwidths, strict=True)]
    assert max(times) == pytest.approx(max((2 * size - 2) / sum(bandwidths), 1 / min(bandwidths)))


def test_waiting_names_the_rank_whose_parts_are_missing_then_the_owner_of_a_result() -> None:
    ranks = [Reduction(1, rank, [1 / 3] * 3, [BucketKind(30_000, F32)], 3) for rank in range(3)]
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
        ([Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 40)], "not due"),
        ([Frame(Kind.END, 1), part()], "after its last"),
        ([Frame(Kind.END, 1), Frame(Kind.END, 1)], "twice"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(frames: list[Frame], words: str) -> None:
    reduction = Reduction(1, 0, [0.5] * 2, [BucketKind(10, F32)], 3)
    list(reduction.contribute(0, {(0, 1): np.zeros(10, np.float32)}))
    *before, last = frames
    for frame in before:
        list(reduction.receive(1, frame))
    with pytest.raises(FrameError, match=words):
        list(reduction.receive(1, last))


def test_leaves_that_nobody_holds_are_an_error_and_not_a_hang() -> None:
    reduction = Reduction(1, 0, [0.5] * 2, [BucketKind(10, F32)], 3)
    list(reduction.contribute(0, {(0, 1): np.zeros(10, np.float32)}))
    list(reduction.end())
    with pytest.raises(FrameError, match="leaves of the sum are missing"):
        list(reduction.receive(1, Frame(Kind.END, 1)))


def test_a_result_arrives_once() -> None:
    reduction = Reduction(1, 1, [1 / 3] * 3, [BucketKind(30_000, F32)], 1)
    result = Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 40_000)
    list(reduction.receive(0, result))
    with pytest.raises(FrameError, match="not due"):
        list(reduction.receive(0, result))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(2, 4),
    num_leaves=st.integers(1, 6),
    num_elements=st.sampled_from([0, 1, 700, DIRECT_BYTES // 4 + 3, 300_001]),
    wire=st.sampled_from([wire for wire, codec in CODECS.items() if not codec.exact]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_a_lossy_wire_leaves_out_is_kept(
    size: int, num_leaves: int, num_elements: int, wire: str, seed: int
) -> None:
    """All ranks have the same result, and over two operations result plus what is owed is the sum."""
    rng, values = random.Random(seed), np.random.default_rng(seed)
    edges = [0, *sorted(rng.randint(0, num_leaves) for _ in range(size - 1)), num_leaves]
    feedback = [Feedback() for _ in range(size)]
    kind = BucketKind(num_elements, F32, wire)
    expected = given_out = np.zeros(num_elements, np.float64)
    for op in (1, 2):
        leaves = [values.standard_normal(num_elements, np.float32) for _ in range(num_leaves)]
        expected = expected + np.sum(leaves, axis=0, dtype=np.float64)
        ranks = [Reduction(op, rank, [1 / size] * size, [kind], num_leaves, feedback[rank]) for rank in range(size)]
        network = Network(ranks, rng)
        for rank, reduction in enumerate(ranks):
            tree = TreeSum[np.ndarray](num_leaves)
            for i in range(edges[rank], edges[rank + 1]):
                tree.put((i, i + 1), leaves[i])
            network.post(rank, reduction.contribute(0, tree.parts))
            network.post(rank, reduction.end())
        network.deliver_all()
        results = [reduction.take(0) for reduction in ranks]
        assert len({result.tobytes() for result in results}) == 1
        given_out = given_out + results[0]
        for owed in feedback:
            owed.commit()
    owed_in_all = sum(owed.residual[0].astype(np.float64) for owed in feedback)
    np.testing.assert_allclose(given_out + owed_in_all, expected, atol=1e-4)
