"""What the machines of a group tell each other while they gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import INTERRUPTED
from mlx_distributed.errors import ConfigError, MlxDistributedError

What = Literal["benchmark", "run"]
"""That a group gathers for."""
NOT_A_MESSAGE = (ValueError, TypeError, RecursionError)
"""Raised where JSON was to come, and something else has."""
LINE_S = 60.0
"""So long a line may be silent where something is due."""
MAX_WORD_CHARS, MAX_ERROR_CHARS = 64, 4000
NEWLINE = "\n"


@dataclass(frozen=True)
class Place:
    """Of one machine in the group."""

    first_rank: int
    num_workers: int
    """Of this machine; their ranks are neighbours."""
    host: str
    """Address of the interface on which they listen."""
    machines: Sequence[str]
    """By rank, the machine that it is on, in words."""
    secret: str = field(repr=False)
    """By which ranks know each other."""
    identity: Mapping[str, str] = field(repr=False)
    """Fields of a `comm.tls.Identity`."""
    job: Mapping[str, Any]
    """What they are to do."""


@dataclass(frozen=True)
class Line:
    """To another machine."""

    control: Control
    who: str

    def receive(self) -> dict[str, Any]:
        """What it says; nothing where it has gone, or says what is no message."""
        try:
            return self.control.receive() or {}
        except NOT_A_MESSAGE:
            return {}

    def addresses(self) -> list[str]:
        """Those that it says while the group is made.

        Raises:
            ConfigError: it has refused something.
            MlxDistributedError: it has ended, gone, or says nothing.
        """
        message = self.receive()
        found = message.get("addresses")
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
        if "ended" not in message:
            raise MlxDistributedError(f"{self.who} has gone, or does not say where its workers are")
        refused = message["ended"] == ConfigError.exit_status
        raise (ConfigError if refused else MlxDistributedError)(self.last_words(message))

    def last_words(self, message: Mapping[str, Any]) -> str:
        """Why it has ended, by its last message."""
        ending = "it was interrupted" if message["ended"] == INTERRUPTED else "it has ended"
        return f"{self.who}: {word(message.get('error') or ending, MAX_ERROR_CHARS, NEWLINE)}"


def word(value: object, max_chars: int = MAX_WORD_CHARS, also: str = "") -> str:
    """What another machine says, fit to be printed: of printable letters, and these."""
    return "".join(letter for letter in str(value)[:max_chars] if letter.isprintable() or letter in also)


def ranks(first: int, count: int) -> str:
    """`rank 3`, or `ranks 3 to 5`."""
    return f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
