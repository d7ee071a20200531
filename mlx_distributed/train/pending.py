"""`Pending`: sums over all ranks that are on their way, or have come, and are not applied yet."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.compress import Feedback


def finite(arrays: Arrays) -> bool:
    """Whether no element is infinite or not a number."""
    return all(mx.isfinite(array).all().item() for array in arrays.values())


class Pending:
    """Sums by name. A part of the state: a checkpoint keeps them, so that to save changes nothing.

    Args:
        wait: gives the sums when they are there.
        computed_at: the parameters that the gradients are of, where somebody will want to know.
        accepts: whether sums will be applied when their time comes.
    """

    def __init__(
        self,
        wait: Callable[[], Arrays],
        computed_at: Arrays | None = None,
        accepts: Callable[[Arrays], bool] = finite,
    ) -> None:
        self._wait, self._accepts = wait, accepts
        self._sums: Arrays | None = None
        self.computed_at = computed_at

    @property
    def here(self) -> bool:
        """Somebody has waited for the sums already."""
        return self._sums is not None

    @property
    def sums(self) -> Arrays:
        """Waits the first time; the same bits on every rank. Raises CommError."""
        if self._sums is None:
            self._sums = self._wait()
        return self._sums

    def settle(self, feedback: Feedback) -> None:
        """Wait, and let `feedback` be as it will be when the sums have been applied, or passed over."""
        if self._accepts(self.sums):
            feedback.commit()
        else:
            feedback.discard()
