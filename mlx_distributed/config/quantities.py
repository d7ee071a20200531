"""Numbers with a unit, as people write them: `12GB`, `8GiB`, `3.5T`."""

from __future__ import annotations

import re

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?) *([a-z/]*)", re.IGNORECASE)


def parse_quantity(text: str, unit: str) -> float | None:
    """A number above 0 with a prefix of a thousand, or with the unit `b` of 1024 (Ki, Mi, ...), and the unit, which may
    be left out, as may `/s`; None where it is none."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    prefix = found[2].lower().removesuffix("/s").removesuffix(unit)
    factor = _PREFIXES.get(prefix) or _BINARY.get(prefix if unit == "b" else "")
    value = float(found[1]) * factor if factor is not None else 0.0
    return value if 0 < value < float("inf") else None


def parse_bytes(text: str) -> int | None:
    """As `parse_quantity`, of memory; at least one byte."""
    value = parse_quantity(text, "b")
    return int(value) if value is not None and value >= 1 else None
