from __future__ import annotations

import numpy as np
import pytest

from mlx_distributed.cli.bench.figures import Link, Row, link_figures, reduction_rows

SIDES = [("grpc", "fp32"), ("grpc", "int8"), ("ring", "fp32")]


def test_a_round_is_its_slowest_rank_and_the_median_counts() -> None:
    times_s = np.array(
        [
            [[1.0, 8.0, 2.0], [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]],
            [[4.0, 5.0, 3.0], [0.5, 2.0, 0.5], [6.0, 6.0, 6.0]],
        ]
    )
    rows = reduction_rows("allreduce", 2, 4_000_000_000, SIDES, times_s, np.zeros_like(times_s))
    assert rows == [
        Row("allreduce", "grpc", "fp32", 2, 4_000_000_000, 4.0, 1.5, cpu_s_per_gb=0.0),
        Row("allreduce", "grpc", "int8", 2, 4_000_000_000, 1.0, 6.0, cpu_s_per_gb=0.0),
        Row("allreduce", "ring", "fp32", 2, 4_000_000_000, 6.0, 1.0, cpu_s_per_gb=0.0),
    ]
    assert rows[0].as_json() == {
        "op": "allreduce",
        "backend": "grpc",
        "wire": "fp32",
        "num_ranks": 2,
        "size_bytes": 4_000_000_000,
        "median_s": 4.0,
        "algbw_gb_per_s": 1.0,
        "ratio_to_ring": 1.5,
        "ratio_to_gloo": None,
        "ratio_to_sockets": None,
        "cpu_s_per_gb": 0.0,
    }


def test_without_the_ring_there_is_no_ratio() -> None:
    (row,) = reduction_rows("latency", 3, 4, SIDES[:1], np.ones((3, 1, 5)), np.ones((3, 1, 5)))
    assert row.ratio_to_ring is None


def test_each_other_side_has_its_ratio() -> None:
    sides = [("grpc", "fp32"), ("gloo", "fp32"), ("sockets", "fp32")]
    times_s = np.array([[[2.0], [1.0], [0.5]]] * 2)
    first, *_ = reduction_rows("allreduce", 2, 4, sides, times_s, times_s)
    assert (first.ratio_to_ring, first.ratio_to_gloo, first.ratio_to_sockets) == (None, 0.5, 0.25)


def test_the_processor_time_of_all_ranks_counts() -> None:
    """Between 3 ranks 4 times the size has to move."""
    cpu_times_s = np.array([[[1.0, 5.0, 2.0]], [[3.0, 0.0, 2.0]], [[4.0, 5.0, 5.0]]])  # together 8, 10 and 9
    (row,) = reduction_rows("allreduce", 3, 250_000_000, SIDES[:1], np.ones((3, 1, 3)), cpu_times_s)
    assert row.cpu_s_per_gb == 9.0


def test_links_are_one_way() -> None:
    """Of the time until the receipt is back, half a round trip belongs to the receipt."""
    round_trips_s, sends_s = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    round_trips_s[0, 1], sends_s[0, 1] = [0.2, 0.1, 9.0], [1.1, 1.0, 1.2]
    round_trips_s[1, 0], sends_s[1, 0] = [0.4, 0.4, 0.4], [0.2, 0.2, 0.2]
    there, back = link_figures(2, 10**9, round_trips_s, sends_s)
    assert (there.source, there.target, back.source, back.target) == (0, 1, 1, 0)
    assert (there.send_s, there.round_trip_s, there.gb_per_s) == pytest.approx((1.0, 0.2, 1.0))
    assert (back.send_s, back.round_trip_s) == pytest.approx((0.1, 0.4))


def test_rows_of_a_link() -> None:
    assert list(Link(2, 0, 3, 1000, send_s=0.5, round_trip_s=0.25).rows()) == [
        Row("round trip 2->0", "grpc", "fp32", 3, 4, 0.25, None),
        Row("send 2->0", "grpc", "fp32", 3, 1000, 0.5, None),
    ]
