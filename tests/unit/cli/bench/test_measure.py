"""The measurements with ranks in threads of one process, over real gRPC."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlx_distributed.cli.bench.figures import Link, Row
from mlx_distributed.cli.bench.measure import canonical_sum, check_sum, measure_links, measure_reductions, values_of
from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.bench.sides import Reduce, Side, grpc_side
from mlx_distributed.comm.compress import CODECS
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.errors import MlxDistributedError
from mlx_distributed.testing import run_ranks

OPTIONS = Options("allreduce", 3, (4, 5 << 20), tuple(CODECS), (), 2)


def test_sums_of_every_wire_and_size_are_right_and_timed() -> None:
    def body(comm: GrpcComm) -> list[Row]:
        sides = [grpc_side(comm, wire) for wire in OPTIONS.wires]
        return list(measure_reductions(comm, sides, OPTIONS))

    first, *others = run_ranks(OPTIONS.num_ranks, body)
    assert isinstance(first, list), first
    assert others == [first, first]
    assert [(row.size_bytes, row.wire) for row in first] == [(s, w) for s in OPTIONS.sizes_bytes for w in CODECS]
    assert all(row.median_s > 0 and row.ratio_to_ring is None for row in first)


def test_a_wrong_sum_ends_it_on_every_rank() -> None:
    def body(comm: GrpcComm) -> list[Row]:
        right = grpc_side(comm, "fp32")

        def prepare(values: np.ndarray) -> Reduce:
            return right.prepare(values if comm.rank else -values)

        return list(measure_reductions(comm, [dataclasses.replace(right, prepare=prepare)], OPTIONS))

    for rank, error in enumerate(run_ranks(3, body)):
        assert isinstance(error, MlxDistributedError), error
        assert f"grpc with fp32 on the wire gave rank {rank} a wrong sum of 4 B" in str(error)


def side(tolerance: float) -> Side:
    return Side("ring", "fp32", tolerance, lambda values: lambda: [values])


def test_a_sum_may_differ_by_the_tolerance() -> None:
    expected = canonical_sum(3, 1000)
    np.testing.assert_allclose(expected, sum(values_of(rank, 1000) for rank in range(3)), atol=1e-6)
    check_sum(side(0.0), expected.copy(), expected, 0)
    check_sum(side(0.01), expected + np.float32(0.005), expected, 0)
    nan = expected.copy()
    nan[7] = np.nan
    for tolerance, found in ((0.0, np.nextafter(expected, 1)), (0.01, expected + 1), (0.01, nan), (0.01, expected[1:])):
        with pytest.raises(MlxDistributedError, match="rank 2 a wrong sum of 4000 B"):
            check_sum(side(tolerance), found, expected, 2)


def test_every_ordered_pair_is_a_link() -> None:
    options = Options("links", 3, (4, 3 << 20), ("fp32",), (), 2)
    first, *others = run_ranks(3, lambda comm: list(measure_links(comm, options)))
    assert isinstance(first, list), first
    assert others == [first, first]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert [(link.size_bytes, link.source, link.target) for link in first] == [
        (size_bytes, *pair) for size_bytes in options.sizes_bytes for pair in pairs
    ]
    assert all(link.send_s > 0 and link.round_trip_s > 0 for link in first)


def test_an_array_that_arrives_as_another_ends_it() -> None:
    def body(comm: GrpcComm) -> list[Link]:
        return list(measure_links(comm, Options("links", 2, (4 + 4 * comm.rank,), ("fp32",), (), 1)))

    errors = run_ranks(2, body)
    assert all(isinstance(error, MlxDistributedError) for error in errors), errors
    assert any(str(error) == "rank 1 did not receive from rank 0 what that had sent" for error in errors), errors
