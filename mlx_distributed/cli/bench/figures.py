"""What has been measured: a row for each sum, a link for each ordered pair of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One figure, as `--json` prints it."""

    op: str
    backend: str
    wire: str
    num_ranks: int
    size_bytes: int
    """Of the float32 values, whatever the wire makes of them."""
    median_s: float
    ratio_to_ring: float | None
    """Time of MLX's ring / `median_s`; None where the ring was not run."""
    ratio_to_gloo: float | None = None
    ratio_to_sockets: float | None = None
    cpu_s_per_gb: float | None = None
    """Processor seconds of all ranks per 10^9 bytes of float32 that have to move: 2 (ranks - 1) times the size."""

    @property
    def algbw_gb_per_s(self) -> float:
        """Size / time, in 10^9 bytes per second."""
        return self.size_bytes / self.median_s / 1e9

    def as_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "backend": self.backend,
            "wire": self.wire,
            "num_ranks": self.num_ranks,
            "size_bytes": self.size_bytes,
            "median_s": self.median_s,
            "algbw_gb_per_s": self.algbw_gb_per_s,
            "ratio_to_ring": self.ratio_to_ring,
            "ratio_to_gloo": self.ratio_to_gloo,
            "ratio_to_sockets": self.ratio_to_sockets,
            "cpu_s_per_gb": self.cpu_s_per_gb,
        }


@dataclass(frozen=True)
class Link:
    """From one rank to another."""

    source: int
    target: int
    num_ranks: int
    size_bytes: int
    send_s: float
    """Until `target` holds an array of `size_bytes`."""
    round_trip_s: float
    """Of an array of one element, there and back."""

    @property
    def gb_per_s(self) -> float:
        """One way, in 10^9 bytes per second."""
        return self.size_bytes / self.send_s / 1e9

    def rows(self) -> Iterator[Row]:
        """The two figures for `--json`."""
        pair = f"{self.source}->{self.target}"
        yield Row(f"round trip {pair}", "grpc", "fp32", self.num_ranks, 4, self.round_trip_s, None)
        yield Row(f"send {pair}", "grpc", "fp32", self.num_ranks, self.size_bytes, self.send_s, None)


def reduction_rows(
    op: str,
    num_ranks: int,
    size_bytes: int,
    sides: Sequence[tuple[str, str]],
    times_s: np.ndarray,
    cpu_times_s: np.ndarray,
) -> list[Row]:
    """The rows of one size.

    Args:
        op: the sub-verb.
        sides: backend and wire of each.
        times_s: [ranks, sides, rounds] seconds. A round takes as long as its slowest rank.
        cpu_times_s: likewise, of all threads of a rank.
    """
    medians_s = np.median(times_s.max(axis=0), axis=-1).tolist()
    cpu_s = np.median(cpu_times_s.sum(axis=0), axis=-1).tolist()
    others_s = {backend: median_s for (backend, _), median_s in zip(sides, medians_s, strict=True)}

    def ratio(other: str, median_s: float) -> float | None:
        return others_s[other] / median_s if other in others_s else None

    return [
        Row(
            op,
            backend,
            wire,
            num_ranks,
            size_bytes,
            median_s,
            ratio("ring", median_s),
            ratio("gloo", median_s),
            ratio("sockets", median_s),
            of_side_s * 1e9 / (2 * (num_ranks - 1) * size_bytes),
        )
        for (backend, wire), median_s, of_side_s in zip(sides, medians_s, cpu_s, strict=True)
    ]


def link_figures(num_ranks: int, size_bytes: int, round_trips_s: np.ndarray, sends_s: np.ndarray) -> list[Link]:
    """The links of one size, by source and target.

    Args:
        round_trips_s: [source, target, rounds] seconds, there and back.
        sends_s: likewise, of an array of `size_bytes` and its receipt.
    """
    there_and_back_s = np.median(round_trips_s, axis=-1)
    # The receipt takes half a round trip. One way cannot be quicker than half of both.
    send_s = np.median(sends_s, axis=-1)
    one_way_s = np.maximum(send_s - there_and_back_s / 2, send_s / 2)
    return [
        Link(i, j, num_ranks, size_bytes, float(one_way_s[i, j]), float(there_and_back_s[i, j]))
        for i in range(num_ranks)
        for j in range(num_ranks)
        if i != j
    ]
