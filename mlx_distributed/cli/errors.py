"""From an exception to what a person sees: one paragraph on stderr and an honest exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from mlx_distributed.errors import MlxDistributedError, printable

INTERRUPTED = 130


def describe(body: Callable[[], int], debug: bool) -> tuple[int, str | None]:
    """Exit status of `body`, and the paragraph to print where it failed in a way that its user can mend.

    Any other exception is a bug and goes on.

    Args:
        body: returns its exit status.
        debug: print the traceback of a failure on stderr.
    """
    try:
        return body(), None
    except MlxDistributedError as error:
        if debug:
            traceback.print_exc()
        return error.exit_status, str(error)
    except KeyboardInterrupt as interrupt:
        return INTERRUPTED, str(interrupt) or None


def run(body: Callable[[], int], debug: bool) -> int:
    """As `describe`, and print the paragraph. A reader of stdout that has gone away ends the program quietly."""
    try:
        status, error = describe(body, debug)
        if error is not None:
            print("\n".join(map(printable, f"error: {error}".split("\n"))), file=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
