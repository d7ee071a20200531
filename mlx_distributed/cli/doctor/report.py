"""All findings and figures of a case, as text for people or as one JSON object."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_distributed.cli.doctor.case import Case
from mlx_distributed.cli.doctor.duplicates import Duplicates, check_duplicates, find_duplicates
from mlx_distributed.cli.doctor.estimate import Estimate, check_estimate
from mlx_distributed.cli.doctor.finding import Finding, Status, counted
from mlx_distributed.cli.doctor.lengths import (
    Lengths,
    Padding,
    check_lengths,
    check_padding,
    histogram,
    measure_lengths,
    measure_padding,
)
from mlx_distributed.cli.doctor.rows import Counts, check_rows, count_rows, fate
from mlx_distributed.cli.doctor.settings import check_settings
from mlx_distributed.cli.doctor.tokens import (
    Labels,
    check_begin,
    check_labels,
    check_special,
    check_stop,
    check_template,
    count_labels,
)
from mlx_distributed.errors import printable

WIDTH = 100
_COLUMN = 26
"""Where the text of a finding begins."""
_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Report:
    """What the doctor says of a run. Figures are None where they could not be had."""

    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]
    """What could not be looked at."""
    rows: Counts | None
    duplicates: Duplicates | None
    labels: Labels | None
    lengths: Lengths | None
    padding: Padding | None
    estimate: Estimate | None

    @property
    def exit_status(self) -> int:
        """2 where a run would be refused, or train something else than is meant."""
        return 2 if any(finding.status == "problem" for finding in self.findings) else 0


def examine(case: Case, estimated: Estimate | str) -> Report:
    """All checks, on what was looked at and what was estimated from it."""
    rows, labels, lengths = count_rows(case), count_labels(case), measure_lengths(case)
    padding = measure_padding(case)
    used = [seen for seen in case.seen if fate(seen, case.config.data) == seen.split]
    duplicates = find_duplicates(used) if used else None
    checks: dict[str, Iterable[Finding]] = {
        "rows": check_rows(case, rows) if rows else (),
        "duplicates": check_duplicates(duplicates) if duplicates else (),
        "chat template": check_template(case),
        "BOS": check_begin(case),
        "stop token": check_stop(case),
        "special tokens": check_special(case),
        "labels": check_labels(case, labels) if labels else (),
        "lengths": check_lengths(case, lengths) if lengths else (),
        "padding": check_padding(case, padding) if padding else (),
        "settings": check_settings(case),
        "memory and time": check_estimate(estimated, case.config.parallel.pipeline.num_stages),
    }
    found = {name: tuple(findings) for name, findings in checks.items()}
    return Report(
        findings=case.findings + tuple(finding for findings in found.values() for finding in findings),
        not_checked=tuple(name for name, findings in found.items() if not findings),
        rows=rows,
        duplicates=duplicates,
        labels=labels,
        lengths=lengths,
        padding=padding,
        estimate=estimated if isinstance(estimated, Estimate) else None,
    )


def as_json(report: Report) -> dict[str, Any]:
    """Everything, as one object."""
    return {"exit_status": report.exit_status, **asdict(report)}


def show(report: Report) -> None:
    """On standard output, in colour where that is a terminal."""
    from rich.console import Console
    from rich.text import Text

    # Not left to rich, which takes FORCE_COLOR, as CI systems set it, for a terminal.
    console = Console(force_terminal=sys.stdout.isatty())

    def out(line: str, status: Status | None = None) -> None:
        text = Text(line)
        if status is not None:
            text.stylize(_COLOURS[status], 0, len(status))
        console.print(text, soft_wrap=True)

    for finding in report.findings:
        first, *others = _wrapped(finding)
        out(first, finding.status)
        for line in others:
            out(line)
        if finding.check == "lengths" and report.lengths is not None:
            for line in histogram(report.lengths):
                out(f"  {line}")
    if report.not_checked:
        out(f"not checked, for what is said above: {', '.join(report.not_checked)}")
    out(summary(report.findings))


def summary(findings: Sequence[Finding]) -> str:
    """What is to be done, in one line."""
    number = Counter(finding.status for finding in findings)
    if number["problem"]:
        names = ", ".join(dict.fromkeys(finding.check for finding in findings if finding.status == "problem"))
        return f"{counted(number['problem'], 'problem')} ({names}) to mend before training"
    return f"nothing stands in the way of training; {counted(number['warning'], 'warning')}"


def _wrapped(finding: Finding) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH - _COLUMN, break_on_hyphens=False, break_long_words=False)
    lines = wrapper.wrap(finding.text)
    wrapper.subsequent_indent = "   "
    lines += wrapper.wrap(f"-> {finding.mend}") if finding.mend else []
    first, *others = map(printable, lines)  # Some of it is from files of others.
    return [f"{finding.status:<8} {finding.check:<15}  {first}", *(" " * _COLUMN + line for line in others)]
