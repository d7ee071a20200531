"""Running out of memory: a micro-batch that does not fit is computed in halves, whose sums are those of the whole.

On Metal MLX raises for what it cannot allocate, and a process that lets go of everything can go on. On a CPU the
process dies instead: whoever has started it can start it again with halves (`cli.elastic.crew`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_distributed.data.batch import Batch
from mlx_distributed.errors import TrainingError

_MESSAGES = re.compile(
    r"\[metal::malloc\] (Attempting to allocate|Resource limit)|\[malloc[a-z_]*\] Unable to allocate"
    r"|\[METAL\] Command buffer execution failed: Insufficient Memory|\bcudaMalloc\w* failed: out of memory"
)
"""Of MLX's allocators: too large a buffer, too many of them, nothing left; and of the GPU when it gets to the work."""

WAYS = (
    "train.gradient_checkpointing=true, a smaller train.micro_batch_size or train.micro_batch_tokens, "
    "optimizer.shard=true with several workers, or LoRA in place of full training"
)
"""What takes less memory."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether MLX has raised this for want of memory."""
    return _MESSAGES.search(str(error)) is not None


@contextmanager
def explained() -> Iterator[None]:
    """Tell people what to do where memory runs out and nothing can be halved: in a pipeline, whose workers compute the
    same micro-batches, in an update, or in an evaluation. Raises TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory ({error}); set what takes less: {WAYS}") from error


@dataclass
class Halving:
    """In how many parts a worker computes its micro-batches."""

    tell: Callable[[str], None] = print
    """Is given a line for people."""
    halvings: int = 0
    """So often every micro-batch is halved, as far as it has the rows: for a worker that has died of a larger one."""
    too_large: int | None = None
    """Tokens, padding too, that did not fit at a time; as many are never tried again."""
    _largest: tuple[int, int] = (0, 0)
    """Rows and tokens, padding too, of the largest part of the micro-batch that is computed."""

    def parts(self, rows: tuple[int, ...], make: Callable[[tuple[int, ...]], Batch]) -> list[Batch]:
        """A micro-batch, or the parts that it is computed in.

        Args:
            rows: of the micro-batch.
            make: a micro-batch of some rows.
        """
        parts = self._cut(rows, make, self.halvings)
        largest = max(parts, key=lambda part: part.tokens.size)
        self._largest = largest.num_rows, largest.tokens.size
        return parts

    def _cut(self, rows: tuple[int, ...], make: Callable[[tuple[int, ...]], Batch], halvings: int) -> list[Batch]:
        batch, middle = make(rows), len(rows) // 2
        fits = self.too_large is None or batch.tokens.size < self.too_large
        if not middle or (fits and halvings <= 0):
            return [batch]
        return [part for half in (rows[:middle], rows[middle:]) for part in self._cut(half, make, halvings - 1)]

    def run_out(self, step: int, error: str) -> None:
        """Memory was not enough for what is computed; nothing of that may be held any more.

        Args:
            step: from 0.
            error: what MLX has said.

        Raises:
            TrainingError: it was a single row, which cannot be halved.
        """
        mx.clear_cache()
        num_rows, num_tokens = self._largest
        if num_rows == 1:
            raise TrainingError(
                f"step {step + 1}: out of memory for a single row of {num_tokens} tokens ({error}); lower "
                f"data.max_seq_length, or set what takes less memory: {WAYS}"
            )
        self.too_large = num_tokens
        self.tell(
            f"step {step + 1}: out of memory for {num_rows} rows, {num_tokens} tokens ({error}); this worker computes "
            "as many in halves from now on: the same sums up to rounding, but for dropout, which falls in other places"
        )
