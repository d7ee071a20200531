"""Sums that travel while their ranks do something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_distributed.comm.base import Communicator, LocalComm, Parts, add_buckets
from mlx_distributed.comm.buckets import BucketLayout, make_layout, to_buckets
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.comm.tree_sum import TreeSum
from mlx_distributed.errors import CommError
from mlx_distributed.testing import run_ranks

NUM_LEAVES, TAG = 7, 3

Result = list[bytes]


def held(comm: Communicator, wire: str = "fp32") -> tuple[tuple[BucketLayout, ...], list[Parts]]:
    """Several buckets of random leaves, and the partial sums of them that a rank holds."""
    rng = np.random.default_rng(0)
    leaves = [
        {"matrix": mx.array(rng.standard_normal((700, 501), np.float32)), "count": mx.array([i], mx.int64)}
        | {f"vector {n}": mx.array(rng.standard_normal(9000, np.float32)) for n in range(5)}
        for i in range(NUM_LEAVES)
    ]
    layout = make_layout(leaves[0], bucket_bytes=1 << 16, wire=wire)
    trees = [TreeSum(NUM_LEAVES, add_buckets) for _ in layout]
    for i in range(comm.rank * NUM_LEAVES // comm.size, (comm.rank + 1) * NUM_LEAVES // comm.size):
        for tree, bucket in zip(trees, to_buckets(layout, leaves[i]), strict=True):
            tree.put((i, i + 1), bucket)
    return layout, [tree.parts for tree in trees]


def to_bytes(sums: list[list[mx.array]]) -> Result:
    return [np.asarray(array).tobytes() for bucket in sums for array in bucket]


def exchange_messages(comm: Communicator) -> None:
    """A small one and a large one between every two ranks."""
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    for peer in peers:
        comm.send(mx.array([comm.rank]), peer, TAG, "a small one")
        comm.send(mx.full(300_000, comm.rank, mx.int32), peer, TAG, "a large one")
    for peer in peers:
        assert comm.recv(peer, TAG, "a small one").item() == peer
        large = comm.recv(peer, TAG, "a large one")
        assert (large.size, large.min().item(), large.max().item()) == (300_000, peer, peer)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_sums_are_those_of_who_waits_at_once(size: int) -> None:
    layout, parts = held(LocalComm())
    expected = to_bytes(LocalComm().all_reduce(layout, NUM_LEAVES, parts, "a test"))

    def body(comm: Communicator) -> list[Result]:
        found = []
        for _ in range(3):
            layout, parts = held(comm)
            wait = comm.start_all_reduce(layout, NUM_LEAVES, parts, "a test")
            exchange_messages(comm)
            mx.eval(mx.random.normal((200, 200)) @ mx.random.normal((200, 200)))
            exchange_messages(comm)
            found += [to_bytes(wait()), to_bytes(comm.all_reduce(layout, NUM_LEAVES, parts, "a test"))]
        return found

    assert (run_ranks(size, body) if size > 1 else [body(LocalComm())]) == [[expected] * 6] * size


@pytest.mark.parametrize("wire", ["bf16", "int4"])
def test_what_is_left_out_is_that_of_who_waits_at_once(wire: str) -> None:
    def body(start: bool) -> Callable[[Communicator], list[Result]]:
        def work(comm: Communicator) -> list[Result]:
            feedback, found = Feedback(), []
            for _ in range(3):
                layout, parts = held(comm, wire)
                if start:
                    wait = comm.start_all_reduce(layout, NUM_LEAVES, parts, "a test", feedback)
                    exchange_messages(comm)
                    found.append(to_bytes(wait()))
                else:
                    found.append(to_bytes(comm.all_reduce(layout, NUM_LEAVES, parts, "a test", feedback)))
                feedback.commit()
                found.append([feedback.residual[index].tobytes() for index in sorted(feedback.residual)])
            return found

        return work

    at_once = run_ranks(3, body(False))
    assert run_ranks(3, body(True)) == at_once
    assert not any(isinstance(result, BaseException) for result in at_once)


def test_the_wait_counts_from_the_first_bucket_to_the_last_one_got() -> None:
    def body(comm: Communicator) -> tuple[float, float, int]:
        layout, parts = held(comm)
        wait = comm.start_all_reduce(layout, NUM_LEAVES, parts, "a test")
        before = comm.traffic.reduce_s
        wait()
        return before, comm.traffic.reduce_s, comm.traffic.sent_bytes

    for result in run_ranks(2, body):
        assert not isinstance(result, BaseException)
        before, after, sent_bytes = result
        assert (before, after > 0.0, sent_bytes > 500_000) == (0.0, True, True)


def leave_when_all_have_started(comm: Communicator, parts: list[Parts]) -> Iterator[Parts]:
    yield parts[0]
    for peer in (peer for peer in range(comm.size) if peer != comm.rank):
        assert comm.recv(peer, TAG, "a start").item() == peer
    raise KeyboardInterrupt("gone")


@pytest.mark.parametrize("size", [2, 3])
def test_a_peer_lost_meanwhile_is_named_and_nothing_more_begins(size: int) -> None:
    def body(comm: Communicator) -> list[tuple[str, int | None]]:
        layout, parts = held(comm)
        if comm.rank == 1:
            comm.start_all_reduce(layout, NUM_LEAVES, leave_when_all_have_started(comm, parts), "a test")
        wait = comm.start_all_reduce(layout, NUM_LEAVES, parts, "a test")
        comm.send(mx.array(comm.rank), 1, TAG, "a start")
        blamed = []
        calls: list[Callable[[], object]] = [
            wait,
            lambda: comm.start_all_reduce(layout, NUM_LEAVES, parts, "another"),
            lambda: comm.check("a computation"),
        ]
        for call in calls:
            with pytest.raises(CommError) as caught:
                call()
            blamed.append((caught.value.op, caught.value.peer))
        return blamed

    results = run_ranks(size, body)
    assert isinstance(results.pop(1), KeyboardInterrupt)
    operations = ("all_reduce of a test", "all_reduce of another", "a computation")
    assert results == [[(operation, 1) for operation in operations]] * (size - 1)
