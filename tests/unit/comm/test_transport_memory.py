"""What the transport holds does not grow with the gradients, however late a rank is; and nobody waits for ever."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mlx_distributed.comm.base import LocalComm, Parts
from mlx_distributed.comm.buckets import make_layout, to_buckets
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.reduction import AHEAD
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.testing import run_ranks

NUM_BUCKETS, BUCKET_BYTES, CHUNK_BYTES = 24, 4 << 20, 1 << 20


@pytest.mark.parametrize(("num_ranks", "wire"), [(2, "fp32"), (2, "int8"), (3, "fp32")])
def test_a_rank_that_is_late_is_not_sent_everything_at_once(num_ranks: int, wire: str) -> None:
    def body(comm: GrpcComm) -> None:
        arrays = {str(index): mx.ones(BUCKET_BYTES // 4) for index in range(NUM_BUCKETS)}
        mx.eval(arrays)

        def parts() -> Iterator[Parts]:
            for index, array in enumerate(arrays.values()):
                yield {(comm.rank, comm.rank + 1): [array]}
                if comm.rank == 0 and index == 0:
                    time.sleep(0.5)  # Nothing depends on it: the longer it is, the more would come in the meantime.

        comm.all_reduce(make_layout(arrays, wire=wire), num_ranks, parts(), "a test")

    tracemalloc.start()
    try:
        assert run_ranks(num_ranks, body) == [None] * num_ranks
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Of all ranks: chunks that wait for a stream, and the buckets that are not complete, as others have sent them and,
    # with a lossy format, as we have.
    assert peak_bytes <= num_ranks * ((num_ranks - 1) * 3 * CHUNK_BYTES + (AHEAD + 2) * BUCKET_BYTES)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_nobody_waits_for_ever_whoever_holds_what(num_ranks: int, wire: str) -> None:
    """Some ranks hold nothing, all wait now and then in the middle, and owners change from bucket to bucket."""
    num_leaves, rng = 5, np.random.default_rng(0)
    leaves = [
        {str(index): mx.array(rng.integers(-9, 9, 40_000), mx.float32) for index in range(9)} for _ in range(num_leaves)
    ]
    mx.eval(leaves)
    layout = make_layout(leaves[0], bucket_bytes=1 << 17, wire=wire)
    whole = [to_buckets(layout, leaf) for leaf in leaves]

    def held(start: int, stop: int) -> list[Parts]:
        """Whole numbers: to sum them in any order gives the same."""
        nodes = cover(start, stop, num_leaves)
        return [
            {(lo, hi): [mx.array(sum(np.asarray(whole[i][index][0]) for i in range(lo, hi)))] for lo, hi in nodes}
            for index in range(len(layout))
        ]

    expected = [np.asarray(bucket[0]) for bucket in LocalComm().all_reduce(layout, num_leaves, held(0, 5), "a test")]

    def body(comm: GrpcComm) -> list[list[np.ndarray]]:
        shares = np.random.default_rng(1)
        found = []
        for turn in range(12):
            edges = [0, *sorted(shares.integers(0, num_leaves + 1, comm.size - 1).tolist()), num_leaves]
            parts = held(edges[comm.rank], edges[comm.rank + 1])

            def slowly(turn: int = turn, parts: list[Parts] = parts) -> Iterator[Parts]:
                for index, part in enumerate(parts):
                    if (index + turn + comm.rank) % 7 == 0:
                        time.sleep(0.01)
                    yield part

            if turn % 2:
                slices = comm.reduce_scatter(layout, num_leaves, slowly(), "a test")
                sums = comm.all_gather_slices(layout, slices, "a test")
            else:
                sums = comm.all_reduce(layout, num_leaves, slowly(), "a test")
            found.append([np.array(bucket[0]) for bucket in sums])
        return found

    for result in run_ranks(num_ranks, body, timeout_s=10.0):
        assert not isinstance(result, BaseException), result
        for sums in result:
            for total, exact in zip(sums, expected, strict=True):
                np.testing.assert_allclose(total, exact, atol=0 if wire == "fp32" else 2.0)
