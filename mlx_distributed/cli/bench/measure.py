"""The measurements as one rank takes part in them. All sides take turns, so that a busy machine is busy for all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_distributed.cli.bench.figures import Link, Row, link_figures, reduction_rows
from mlx_distributed.cli.bench.options import ELEMENT_BYTES, Options, format_size
from mlx_distributed.cli.bench.sides import Reduce, Side
from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.tree_sum import TreeSum
from mlx_distributed.errors import MlxDistributedError

TURN_BYTES, MAX_REPEATS = 1 << 20, 20
"""Small sums are made many times in a row, so that it does not count how evenly the ranks started."""
NUM_ROUND_TRIPS = 10
"""In a row, likewise."""


def measure_reductions(comm: Communicator, sides: Sequence[Side], options: Options) -> Iterator[Row]:
    """The rows of each size, the same on every rank.

    Raises:
        CommError: a rank is lost.
        MlxDistributedError: a sum is wrong.
    """
    for size_bytes in options.sizes_bytes:
        num_elements = size_bytes // ELEMENT_BYTES
        mine = values_of(comm.rank, num_elements)
        reductions = [side.prepare(mine) for side in sides]
        # The first sum is checked; it also makes connections and buffers, whose time is not wanted.
        expected = canonical_sum(comm.size, num_elements)
        for side, reduce in zip(sides, reductions, strict=True):
            check_sum(side, np.concatenate(reduce()), expected, comm.rank)
        del expected
        num_repeats = max(1, min(MAX_REPEATS, TURN_BYTES // size_bytes))
        both_s = _gather(comm, _time_turns(comm, reductions, options.num_rounds, num_repeats))
        names = [(side.backend, side.wire) for side in sides]
        yield from reduction_rows(options.op, comm.size, size_bytes, names, both_s[:, 0], both_s[:, 1])


def measure_links(comm: Communicator, options: Options) -> Iterator[Link]:
    """The links of each size, the same on every rank. One pair at a time is busy.

    Raises:
        CommError: a rank is lost.
        MlxDistributedError: an array did not arrive as it was sent.
    """
    for size_bytes in options.sizes_bytes:
        array = mx.array(values_of(0, size_bytes // ELEMENT_BYTES))
        mx.eval(array)
        times_s = np.zeros((2, comm.size, options.num_rounds), np.float32)
        pairs = list(itertools.permutations(range(comm.size), 2))
        for number, (source, target) in itertools.product(range(options.num_rounds), pairs):
            comm.barrier("the next pair")
            if comm.rank == source:
                times_s[:, target, number] = _send(comm, target, array)
            elif comm.rank == target:
                _answer(comm, source, array)
        both_s = _gather(comm, times_s)
        yield from link_figures(comm.size, size_bytes, both_s[:, 0], both_s[:, 1])


def values_of(rank: int, num_elements: int) -> np.ndarray:
    """What a rank puts in: float32 from -0.5 to 0.5."""
    return np.random.default_rng(rank).random(num_elements, np.float32) - np.float32(0.5)


def canonical_sum(num_ranks: int, num_elements: int) -> np.ndarray:
    """Over all ranks, each of them a leaf of the tree."""
    tree = TreeSum[np.ndarray](num_ranks)
    for rank in range(num_ranks):
        tree.put((rank, rank + 1), values_of(rank, num_elements))
    return tree.total


def check_sum(side: Side, found: np.ndarray, expected: np.ndarray, rank: int) -> None:
    """Compare a sum with the canonical one.

    Raises:
        MlxDistributedError: they differ by more than the side may.
    """
    if side.tolerance:
        right = found.shape == expected.shape and bool(np.all(np.abs(found - expected) <= side.tolerance))
    else:
        right = np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    if not right:
        allowed = f"may differ by {side.tolerance:.1g}" if side.tolerance else "must be the same bits"
        raise MlxDistributedError(
            f"{side.backend} with {side.wire} on the wire gave rank {rank} a wrong sum of "
            f"{format_size(expected.nbytes)}: it is not that of numpy ({allowed}), so that its speed says nothing"
        )


def _time_turns(comm: Communicator, reductions: Sequence[Reduce], num_rounds: int, num_repeats: int) -> np.ndarray:
    """Seconds of one sum on this rank, and processor seconds of all its threads: [2, sides, rounds]."""
    times_s = np.zeros((2, len(reductions), num_rounds), np.float32)
    for number in range(num_rounds):
        for turn in range(len(reductions)):
            index = (turn + number) % len(reductions)  # Nobody is always first.
            reduce = reductions[index]
            comm.barrier("the next turn")
            start_s, cpu_start_s = time.perf_counter(), time.process_time()
            for _ in range(num_repeats):
                reduce()
            times_s[0, index, number] = (time.perf_counter() - start_s) / num_repeats
            # With what this rank still does for its peers, and with the barrier.
            comm.barrier("the end of the turn")
            times_s[1, index, number] = (time.process_time() - cpu_start_s) / num_repeats
    return times_s


def _send(comm: Communicator, target: int, array: mx.array) -> tuple[float, float]:
    """Seconds of a round trip, and of sending an array until its receipt comes back."""
    start_s = time.perf_counter()
    for _ in range(NUM_ROUND_TRIPS):
        comm.send(mx.zeros(1), target, 0, "a round trip")
        comm.recv(target, 0, "a round trip")
    middle_s = time.perf_counter()
    comm.send(array, target, 0, "an array")
    comm.recv(target, 0, "a receipt")
    return (middle_s - start_s) / NUM_ROUND_TRIPS, time.perf_counter() - middle_s


def _answer(comm: Communicator, source: int, expected: mx.array) -> None:
    for _ in range(NUM_ROUND_TRIPS):
        comm.send(comm.recv(source, 0, "a round trip"), source, 0, "a round trip")
    found = comm.recv(source, 0, "an array")
    comm.send(mx.zeros(1), source, 0, "a receipt")
    if not mx.array_equal(found, expected):
        raise MlxDistributedError(f"rank {comm.rank} did not receive from rank {source} what that had sent")


def _gather(comm: Communicator, times_s: np.ndarray) -> np.ndarray:
    """Those of all ranks, [ranks, ...]."""
    return np.stack([np.asarray(of_rank) for of_rank in comm.all_gather(mx.array(times_s), "the times")])
