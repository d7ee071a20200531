"""All ranks of an all_reduce in one thread: frames are delivered by hand, in any order that a network could give."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.comm.buckets import BLOCK
from mlx_distributed.comm.compress import CODECS, Feedback
from mlx_distributed.comm.reduction import (
    AHEAD,
    DIRECT_BYTES,
    BucketKind,
    Operation,
    Outgoing,
    Reduction,
    fineness,
    ownership,
    slices,
)
from mlx_distributed.comm.tree_sum import Node, TreeSum
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


def make_results(reduction: Reduction, elements: list[int]) -> list[np.ndarray]:
    """Where the results of one rank are written, full of what they must not be."""
    return [np.full(reduction.result_size(index), np.nan, np.float32) for index in range(len(elements))]


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
    bandwidths = [rng.uniform(1, 9) for _ in range(size)]
    fine, kinds = fineness(bandwidths), [BucketKind(n, F32) for n in elements]
    shares = ownership(bandwidths)
    ranks = [Reduction(1, rank, shares, kinds, num_leaves, fineness=fine) for rank in range(size)]
    edges = [0, *sorted(rng.randint(0, num_leaves) for _ in range(size - 1)), num_leaves]
    results = [make_results(reduction, elements) for reduction in ranks]
    network = Network(ranks, rng)
    for rank, reduction in enumerate(ranks):
        for index in range(len(elements)):
            tree = TreeSum[np.ndarray](num_leaves)
            for i in range(edges[rank], edges[rank + 1]):
                tree.put((i, i + 1), leaves[i][index])
            network.post(rank, reduction.contribute(index, tree.parts, results[rank][index]))
        network.post(rank, reduction.end())
    network.deliver_all()
    for index in range(len(elements)):
        whole = TreeSum[np.ndarray](num_leaves)
        for i in range(num_leaves):
            whole.put((i, i + 1), leaves[i][index])
        for reduction, found in zip(ranks, results, strict=True):
            assert reduction.done
            assert not reduction.waiting_for()
            assert found[index].tobytes() == whole.total.tobytes()


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 4),
    num_leaves=st.integers(1, 9),
    elements=st.lists(st.sampled_from([0, 1, 1000, BLOCK + 3, 400_001]), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_scatter_and_a_gather_make_a_sum(size: int, num_leaves: int, elements: list[int], seed: int) -> None:
    """Every rank gets the sums of its slices, and from those of all ranks come the buckets."""
    rng, values = random.Random(seed), np.random.default_rng(seed)
    leaves = [[values.standard_normal(n, np.float32) for n in elements] for _ in range(num_leaves)]
    shares = ownership([rng.uniform(1, 9) for _ in range(size)])
    kinds = [BucketKind(n, F32) for n in elements]
    edges = [0, *sorted(rng.randint(0, num_leaves) for _ in range(size - 1)), num_leaves]
    totals = []
    for index in range(len(elements)):
        whole = TreeSum[np.ndarray](num_leaves)
        for i in range(num_leaves):
            whole.put((i, i + 1), leaves[i][index])
        totals.append(whole.total)

    def exchange(operation: Operation, parts: Callable[[int, int], dict[Node, np.ndarray]]) -> list[list[np.ndarray]]:
        num_given = 1 if operation is Operation.ALL_GATHER else num_leaves
        ranks = [Reduction(1, rank, shares, kinds, num_given, operation) for rank in range(size)]
        results = [make_results(reduction, elements) for reduction in ranks]
        network = Network(ranks, rng)
        for rank, reduction in enumerate(ranks):
            for index in range(len(elements)):
                network.post(rank, reduction.contribute(index, parts(rank, index), results[rank][index]))
            network.post(rank, reduction.end())
        network.deliver_all()
        assert all(reduction.done and not reduction.waiting_for() for reduction in ranks)
        return results

    def sums(rank: int, index: int) -> dict[Node, np.ndarray]:
        tree = TreeSum[np.ndarray](num_leaves)
        for i in range(edges[rank], edges[rank + 1]):
            tree.put((i, i + 1), leaves[i][index])
        return tree.parts

    scattered = exchange(Operation.REDUCE_SCATTER, sums)
    for index, total in enumerate(totals):
        for rank, (start, stop) in enumerate(slices(total.size, shares, index)):
            assert scattered[rank][index].tobytes() == total[start:stop].tobytes()
    gathered = exchange(Operation.ALL_GATHER, lambda rank, index: {(0, 1): scattered[rank][index]})
    for index, total in enumerate(totals):
        assert {result[index].tobytes() for result in gathered} == {total.tobytes()}


@given(st.integers(0, 10**8), st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.integers(0, 100))
def test_slices_are_whole_blocks_in_proportion(num_elements: int, weights: list[float], index: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    found = slices(num_elements, shares, index)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == num_elements
    assert all(start <= stop and (start % BLOCK == 0 or start == num_elements) for start, stop in found)
    for (start, stop), share in zip(found, shares, strict=True):
        assert abs(stop - start - share * num_elements) <= 2 * BLOCK


def test_nobody_gets_less_of_all_buckets() -> None:
    for num_elements, num_ranks in ((10, 3), (BLOCK + 1, 3), (4 * BLOCK, 3), (BLOCK, 2), (5 * BLOCK, 4)):
        totals = [0] * num_ranks
        for index in range(num_ranks):
            for rank, (start, stop) in enumerate(slices(num_elements, [1 / num_ranks] * num_ranks, index)):
                totals[rank] += -(-(stop - start) // BLOCK)
        assert len(set(totals)) == 1
    assert slices(10, [0.5, 0.0, 0.5], 0) == [(0, 0), (0, 0), (0, 10)]


@given(st.lists(st.floats(0.1, 1000.0), min_size=3, max_size=9))
def test_ownership_is_the_optimum(bandwidths: list[float]) -> None:
    """No link is busy longer than the mean, unless one would be so by owning nothing."""
    size, shares = len(bandwidths), ownership(bandwidths)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    times = [(1 + (size - 2) * share) / bandwidth for share, bandwidth in zip(shares, bandwidths, strict=True)]
    assert max(times) == pytest.approx(max((2 * size - 2) / sum(bandwidths), 1 / min(bandwidths)))


def test_a_chunk_takes_the_slowest_link_as_long_as_a_whole_one_takes_the_fastest() -> None:
    assert fineness([7.0, 7.0, 7.0]) == 1.0
    assert fineness([1000, 1000, 200]) == 0.2
    assert fineness([1000, 1]) == 1 / 8
    kinds = [BucketKind(3 << 20, F32)]
    coarse, fine = (Reduction(1, 0, [1.0, 0, 0], kinds, 3, fineness=f) for f in (1.0, 0.5))
    values = np.zeros(3 << 20, np.float32)
    parts = [[len(frame.payload) for _, frame in r.contribute(0, {(0, 3): values}, values)] for r in (coarse, fine)]
    assert parts == [[1 << 20] * 24, [1 << 19] * 48]


def test_waiting_names_the_rank_whose_parts_are_missing_then_the_owner_of_a_result() -> None:
    ranks = [Reduction(1, rank, [1 / 3] * 3, [BucketKind(3 * BLOCK, F32)], 3) for rank in range(3)]
    values = np.ones(3 * BLOCK, np.float32)
    parts = [{(rank, rank + 1): values} for rank in range(3)]
    sent = [[*r.contribute(0, parts[rank], np.empty_like(values)), *r.end()] for rank, r in enumerate(ranks)]
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


def test_waiting_names_the_rank_that_holds_up_the_others() -> None:
    """Rank 1 has no room for more while rank 2 is late: it is as silent, and not to blame."""
    kinds = [BucketKind(10, F32)] * (AHEAD + 3)
    values = np.ones(10, np.float32)
    ranks = [Reduction(1, rank, [1 / 3] * 3, kinds, 3) for rank in range(3)]

    def give(source: int, index: int) -> None:
        result = np.empty(10, np.float32)
        for peer, frame in list(ranks[source].contribute(index, {(source, source + 1): values}, result)):
            assert ranks[peer].is_due(frame)
            assert list(ranks[peer].receive(source, frame)) == []

    for index in range(AHEAD + 1):
        for rank in (0, 1):
            assert ranks[rank].has_room(index)
            give(rank, index)
    assert not ranks[0].has_room(AHEAD + 1)
    assert ranks[0].waiting_for() == ranks[1].waiting_for() == {2}
    give(2, 0)
    assert ranks[0].waiting_for() == {2}
    assert ranks[0].has_room(AHEAD + 1)
    assert not ranks[0].has_room(AHEAD + 2)


def test_what_is_far_ahead_of_this_rank_is_not_due() -> None:
    reduction = Reduction(1, 0, [0.5] * 2, [BucketKind(10, F32)] * 5, 2)
    due = [bucket for bucket in range(5) if reduction.is_due(part(bucket=bucket))]
    assert due == list(range(AHEAD + 1))
    contribute(reduction, (0, 1))
    assert [bucket for bucket in range(5) if reduction.is_due(part(bucket=bucket))] == [*due, AHEAD + 1]
    assert reduction.is_due(Frame(Kind.END, 1))
    assert reduction.is_due(part(bucket=5))  # To be refused.


def contribute(reduction: Reduction, node: Node) -> None:
    values = np.zeros(10, np.float32)
    list(reduction.contribute(0, {node: values}, np.empty(reduction.result_size(0), np.float32)))


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
    contribute(reduction, (0, 1))
    *before, last = frames
    for frame in before:
        list(reduction.receive(1, frame))
    with pytest.raises(FrameError, match=words):
        list(reduction.receive(1, last))


def test_leaves_that_nobody_holds_are_an_error_and_not_a_hang() -> None:
    reduction = Reduction(1, 0, [0.5] * 2, [BucketKind(10, F32)], 3)
    contribute(reduction, (0, 1))
    list(reduction.end())
    with pytest.raises(FrameError, match="leaves of the sum are missing"):
        list(reduction.receive(1, Frame(Kind.END, 1)))


@pytest.mark.parametrize(
    ("operation", "frame", "words"),
    [
        (Operation.ALL_GATHER, part((0, 1), num_bytes=4 * BLOCK), "where there are none"),
        (Operation.REDUCE_SCATTER, Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 4 * BLOCK), "not due"),
        (Operation.ALL_GATHER, Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 4), "4 bytes"),
    ],
)
def test_a_frame_of_the_other_half_is_refused(operation: Operation, frame: Frame, words: str) -> None:
    reduction = Reduction(1, 0, [0.5] * 2, [BucketKind(2 * BLOCK, F32)], 1, operation)
    with pytest.raises(FrameError, match=words):
        list(reduction.receive(1, frame))


def test_a_rank_is_done_only_when_all_its_frames_are_made() -> None:
    """Or it might leave while some are not queued yet."""
    reduction = Reduction(1, 0, [0.5] * 2, [BucketKind(10, F32)], 2)
    list(reduction.receive(1, part()))
    list(reduction.receive(1, Frame(Kind.END, 1)))
    list(reduction.contribute(0, {(0, 1): np.zeros(10, np.float32)}, np.zeros(10, np.float32)))
    outgoing = reduction.end()
    assert next(outgoing) == (1, Frame(Kind.END, 1))
    assert not reduction.done
    assert list(outgoing) == []
    assert reduction.done


def test_a_result_arrives_once() -> None:
    reduction = Reduction(1, 1, [1 / 3] * 3, [BucketKind(3 * BLOCK, F32)], 1)
    result = Frame(Kind.RESULT, 1, 0, 0, payload=b"\0" * 4 * BLOCK)
    list(reduction.receive(0, result))
    with pytest.raises(FrameError, match="not due"):
        list(reduction.receive(0, result))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(2, 4),
    num_leaves=st.integers(1, 6),
    num_elements=st.sampled_from([0, 1, 700, DIRECT_BYTES // 4 + 3, 300_001]),
    wire=st.sampled_from([wire for wire, codec in CODECS.items() if not codec.exact]),
    operation=st.sampled_from([Operation.ALL_REDUCE, Operation.REDUCE_SCATTER]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_a_lossy_wire_leaves_out_is_kept(
    size: int, num_leaves: int, num_elements: int, wire: str, operation: Operation, seed: int
) -> None:
    """All ranks have the same result, or slices of one, and over operations it is the sum, but for what is owed. In
    between others own the slices, as they do when fewer workers go on."""
    rng, values = random.Random(seed), np.random.default_rng(seed)
    edges = [0, *sorted(rng.randint(0, num_leaves) for _ in range(size - 1)), num_leaves]
    feedback = [Feedback() for _ in range(size)]
    kind = BucketKind(num_elements, F32, wire)
    expected = given_out = np.zeros(num_elements, np.float64)
    for op, own in ((1, Operation.ALL_REDUCE), (2, operation), (3, operation)):
        leaves = [values.standard_normal(num_elements, np.float32) for _ in range(num_leaves)]
        expected = expected + np.sum(leaves, axis=0, dtype=np.float64)
        shares = ownership([rng.uniform(1, 9) for _ in range(size)])
        ranks = [Reduction(op, rank, shares, [kind], num_leaves, own, feedback[rank]) for rank in range(size)]
        results = [make_results(reduction, [num_elements])[0] for reduction in ranks]
        network = Network(ranks, rng)
        for rank, reduction in enumerate(ranks):
            tree = TreeSum[np.ndarray](num_leaves)
            for i in range(edges[rank], edges[rank + 1]):
                tree.put((i, i + 1), leaves[i])
            network.post(rank, reduction.contribute(0, tree.parts, results[rank]))
            network.post(rank, reduction.end())
        network.deliver_all()
        if own is Operation.ALL_REDUCE:
            assert len({result.tobytes() for result in results}) == 1
            given_out = given_out + results[0]
        else:
            given_out = given_out + np.concatenate(results)
        for owed in feedback:
            owed.commit()
    owed_in_all = sum(owed.residual[0].astype(np.float64) for owed in feedback)
    np.testing.assert_allclose(given_out + owed_in_all, expected, atol=1e-4)
