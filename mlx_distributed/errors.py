"""The errors that people see. Each message is one paragraph: the value that was given, the rule, what would work.

The class decides the exit status of a command: `ConfigError` and `DataError` end with 2, since nothing has started;
`CommError`, `CheckpointError`, `StreamError`, `TrainingError` and `UploadError` end with 1.
"""

from __future__ import annotations


class MlxDistributedError(Exception):
    """Base of every error that a user can cause or mend; printed without a traceback."""

    exit_status = 1


class ConfigError(MlxDistributedError):
    """The configuration was refused before anything started."""

    exit_status = 2


class DataError(MlxDistributedError):
    """The data were refused before anything started."""

    exit_status = 2


class StreamError(MlxDistributedError):
    """Data that are read while a run goes on have changed, are broken, or cannot be had any more."""


class CheckpointError(MlxDistributedError):
    """A checkpoint could not be written, read or used."""


class UploadError(MlxDistributedError):
    """What was exported could not be uploaded; it is whole on this machine."""


class TrainingError(MlxDistributedError):
    """Training cannot go on, for example because the loss is not finite."""


class CommError(MlxDistributedError):
    """A collective failed. The communicator that raised it is dead: every later call on it raises at once.

    Args:
        op: the operation and what it was for, as in ``all_reduce of the gradients of step 12``.
        peer: rank that caused it, None where no single rank did.
        generation: of the group.
        elapsed_s: seconds from the start of the operation to the failure.
        reason: in words.
    """

    def __init__(self, op: str, peer: int | None, generation: int, elapsed_s: float, reason: str) -> None:
        who = "" if peer is None else f" rank {peer}:"
        super().__init__(f"{op} failed after {elapsed_s:.1f} s:{who} {reason} (generation {generation})")
        self.op, self.peer, self.generation = op, peer, generation
        self.elapsed_s, self.reason = elapsed_s, reason


def printable(text: str) -> str:
    """`text` of others on one line and with nothing that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
