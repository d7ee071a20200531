"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One check."""

    check: str
    """Its name."""
    status: Status
    """`problem` where a run would be refused, or train something else than is meant."""
    text: str
    mend: str = ""
    """What would change it."""


def percent(part: float, whole: float) -> str:
    """`part` of `whole`; 0 of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def counted(number: int, one: str = "row", several: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {one if number == 1 else several or one + 's'}"
