"""Text of others, fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line and with nothing that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
