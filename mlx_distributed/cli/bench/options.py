"""What to measure: the words of the command line, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mlx_distributed.errors import ConfigError

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ELEMENT_BYTES = 4
"""What is summed is float32."""
MAX_SIZE_BYTES = 1 << 30
"""Gradients travel in buckets of a few MiB, so that larger sums tell nothing new."""
MAX_RANKS = 64
BACKENDS = ("ring", "gloo", "sockets")
"""What ours can be compared with."""
BACKENDS_OVER_NETWORK = ("ring",)
"""Likewise, where ranks are on several machines."""

_SIZE = re.compile(rf"(\d+) *({'|'.join(UNITS)})", re.IGNORECASE)
_FACTORS = {name.lower(): factor for name, factor in UNITS.items()}


@dataclass(frozen=True)
class Options:
    """What every rank is told."""

    op: str
    num_ranks: int
    sizes_bytes: tuple[int, ...]
    wires: tuple[str, ...]
    against: tuple[str, ...]
    num_rounds: int
    tls: bool = False
    """Ours over TLS too."""
    over_network: bool = False
    """Ranks are on several machines, and nothing of ours goes without TLS."""


def read_options(
    op: str,
    nproc: str,
    sizes: str,
    wire: str,
    against: str,
    rounds: str,
    tls: bool,
    wires: Collection[str],
    over_network: bool = False,
) -> Options:
    """The options of one benchmark from its arguments.

    Args:
        op: the sub-verb.
        tls: a flag.
        wires: the formats that there are.
        over_network: ranks are on several machines; `nproc` is then what was given as `--workers`.

    Raises:
        ConfigError: one of them makes no sense; the message says what would.
    """
    count = "workers" if over_network else "nproc"
    num_ranks = _whole_number(count, nproc, 2, MAX_RANKS, "a single rank has nobody to send to; use 2 or more")
    known = BACKENDS_OVER_NETWORK if over_network else BACKENDS
    return Options(
        op,
        num_ranks,
        tuple(dict.fromkeys(map(parse_size, _words(sizes, "sizes")))),
        tuple(dict.fromkeys(_chosen("wire", wire, wires))),
        tuple(dict.fromkeys(_chosen("against", against, known))) if against != "none" else (),
        _whole_number("rounds", rounds, 1, 10_000, "medians need at least one round; use 10 or so"),
        tls or over_network,
        over_network,
    )


def parse_size(text: str) -> int:
    """Bytes, from a text such as 64KiB.

    Raises:
        ConfigError: it is no size, or none that float32 values fill.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--sizes {text}: a size is a whole number with a unit ({', '.join(UNITS)}), such as 64KiB; several are "
            "separated by commas, as in 1KiB,64KiB,1MiB"
        )
    size_bytes = int(match[1]) * _FACTORS[match[2].lower()]
    if size_bytes % ELEMENT_BYTES or not ELEMENT_BYTES <= size_bytes <= MAX_SIZE_BYTES:
        nearest = min(max(size_bytes // ELEMENT_BYTES * ELEMENT_BYTES, ELEMENT_BYTES), MAX_SIZE_BYTES)
        raise ConfigError(
            f"--sizes {text}: float32 values of {ELEMENT_BYTES} bytes are sent, so that a size is a multiple of "
            f"{ELEMENT_BYTES} B, from {ELEMENT_BYTES} B to {format_size(MAX_SIZE_BYTES)}; use {format_size(nearest)}"
        )
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The inverse of `parse_size`, in the largest unit that leaves a whole number."""
    name, factor = next((name, factor) for name, factor in reversed(UNITS.items()) if size_bytes % factor == 0)
    return f"{size_bytes // factor} {name}"


def _words(text: str, option: str) -> Iterator[str]:
    for word in text.split(","):
        if not word.strip():
            raise ConfigError(f"--{option} {text!r}: there is nothing before or after a comma; write --{option} a,b,c")
        yield word.strip()


def _chosen(option: str, text: str, known: Collection[str]) -> Iterator[str]:
    for word in _words(text, option):
        if word not in known:
            raise ConfigError(f"--{option} {word}: unknown; there are {', '.join(known)}")
        yield word


def _whole_number(option: str, text: str, least: int, most: int, why: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ConfigError(f"--{option} {text}: must be a whole number from {least} to {most}")
    number = int(text)
    if number < least:
        raise ConfigError(f"--{option} {text}: {why}")
    if number > most:
        raise ConfigError(f"--{option} {text}: more than this can measure; use {most} or less")
    return number
