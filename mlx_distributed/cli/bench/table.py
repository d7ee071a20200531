"""Figures as lines of text."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from mlx_distributed.cli.bench.figures import Link, Row
from mlx_distributed.cli.bench.options import format_size

_COLUMNS = "{:>8}  {:<8}  {:<4}  {:>9}  {:>6}  {:>8}  {:>11}  {:>11}  {:>14}"


def machine() -> str:
    """Versions, cores and load: what figures must be read with."""
    versions = [f"python {platform.python_version()}"]
    for package in ("mlx-distributed", "mlx", "grpcio", "numpy", "torch"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # torch need not be there
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{', '.join(versions)}\n{platform.platform()}, {os.cpu_count()} cores, load {load}"


def row_heading() -> str:
    """Above the lines of `row_line`."""
    names = ("size", "backend", "wire", "median", "GB/s", "CPU s/GB", "ring / this", "Gloo / this", "sockets / this")
    return _COLUMNS.format(*names)


def row_line(row: Row) -> str:
    """One sum; a ratio is above 1 where it was faster than the other."""
    size, median, bandwidth = format_size(row.size_bytes), format_time(row.median_s), f"{row.algbw_gb_per_s:.3f}"
    others = (row.cpu_s_per_gb, row.ratio_to_ring, row.ratio_to_gloo, row.ratio_to_sockets)
    figures = ("-" if value is None else f"{value:.2f}" for value in others)
    return _COLUMNS.format(size, row.backend, row.wire, median, bandwidth, *figures)


def link_lines(links: Sequence[Link]) -> Iterator[str]:
    """All links as tables: one of the bandwidth for each size, and one of the round trips."""
    for size_bytes in dict.fromkeys(link.size_bytes for link in links):
        of_size = [link for link in links if link.size_bytes == size_bytes]
        yield f"one way, {format_size(size_bytes)}, GB/s"
        yield from _matrix(of_size, lambda link: f"{link.gb_per_s:.3f}")
        yield ""
    yield "round trip"
    yield from _matrix(of_size, lambda link: format_time(link.round_trip_s))


def format_time(seconds: float) -> str:
    """With three digits or so."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _matrix(links: Sequence[Link], cell: Callable[[Link], str]) -> Iterator[str]:
    cells = {(link.source, link.target): cell(link) for link in links}
    ranks = range(links[0].num_ranks)
    yield "from \\ to" + "".join(f"{rank:>10}" for rank in ranks)
    for source in ranks:
        yield f"{source:>9}" + "".join(f"{cells.get((source, target), '-'):>10}" for target in ranks)
