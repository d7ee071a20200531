from __future__ import annotations

import os

import pytest

from mlx_distributed.cli.bench.figures import Link, Row
from mlx_distributed.cli.bench.table import format_time, link_lines, machine, row_heading, row_line

LINKS = [Link(0, 1, 2, 1 << 20, 1e-3, 5e-4), Link(1, 0, 2, 1 << 20, 2e-3, 2.0)]


def test_columns_stand_below_their_names() -> None:
    rows = [
        Row("allreduce", "grpc-tls", "int8", 2, 64 << 20, 0.05, 1.25, 0.75, 0.5, 1.125),
        Row("allreduce", "gloo", "fp32", 2, 4, 2e-4, None),
    ]
    lines = [row_heading(), *map(row_line, rows)]
    assert lines == [
        "    size  backend   wire     median    GB/s  CPU s/GB  ring / this  Gloo / this  sockets / this",
        "  64 MiB  grpc-tls  int8   50.00 ms   1.342      1.12         1.25         0.75            0.50",
        "     4 B  gloo      fp32     200 us   0.000         -            -            -               -",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(2.5e-4, "250 us"), (0.0125, "12.50 ms"), (3.25, "3.25 s")])
def test_times_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


def test_links_are_tables() -> None:
    assert list(link_lines(LINKS)) == [
        "one way, 1 MiB, GB/s",
        "from \\ to         0         1",
        "        0         -     1.049",
        "        1     0.524         -",
        "",
        "round trip",
        "from \\ to         0         1",
        "        0         -    500 us",
        "        1    2.00 s         -",
    ]


def test_each_size_has_its_table() -> None:
    lines = list(link_lines([*LINKS, Link(0, 1, 2, 4, 1e-3, 5e-4), Link(1, 0, 2, 4, 1e-3, 7e-4)]))
    assert [line for line in lines if line.startswith("one way")] == ["one way, 1 MiB, GB/s", "one way, 4 B, GB/s"]
    assert lines[-1].split() == ["1", "700", "us", "-"]


def test_figures_stand_beside_versions_cores_and_load() -> None:
    text = machine()
    assert "mlx-distributed 0." in text
    assert "grpcio 1." in text
    assert f"{os.cpu_count()} cores, load " in text
