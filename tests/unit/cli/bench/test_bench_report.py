from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mlx_distributed.cli.bench.figures import Link, Row
from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.bench.report import Report

LINKS = [Link(0, 1, 2, 4, 1e-3, 5e-4), Link(1, 0, 2, 4, 2e-3, 6e-4)]


def report(op: str, as_json: bool, picture: Path | None, messages: list[dict[str, object]]) -> None:
    report = Report(Options(op, 2, (4,), ("fp32",), ("ring",), 1), as_json, picture)
    report.begin()
    for message in messages:
        report.hear(message)
    report.end()


def test_json_is_rows_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report("links", True, tmp_path / "links.svg", [{"link": asdict(link)} for link in LINKS])
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [row.as_json() for link in LINKS for row in link.rows()]
    assert err == ""
    assert (tmp_path / "links.svg").exists()


def test_a_note_is_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("allreduce", "grpc", "fp32", 2, 4, 1e-3, None)
    report("allreduce", True, None, [{"note": "gloo is left out"}, {"row": asdict(row)}, {"error": "of the group"}])
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == (row.as_json(), "note: gloo is left out\n")


def test_a_person_sees_what_was_measured_first(capsys: pytest.CaptureFixture[str]) -> None:
    report("links", False, None, [{"link": asdict(link)} for link in LINKS])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python 3.")
    assert lines[2] == "links, 2 ranks on this machine, medians of 1 rounds"
    assert lines[4] == "one way, 4 B, GB/s"
