"""Where MLX's random numbers of this thread stand: `mx.random.seed` takes back what `random_key` gives."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

_MAX_DRAWS = 1000


def random_key() -> int:
    """The state of MLX's random numbers on this thread."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return (high << 32) | low


def skip_draws(num_draws: int) -> None:
    """Leave the random numbers as they stand after so many draws."""
    for _ in range(num_draws):
        mx.random.uniform()  # never evaluated: a draw of any shape splits the key once


class DrawCounter:
    """Seeds the random numbers anew and tells how many have been drawn since, each of any shape."""

    def __init__(self) -> None:
        mx.random.seed(0)
        self._num_draws, self._key = 0, random_key()

    def count(self) -> int:
        """How many draws there were. To be asked often: finding out takes as long as drawing again.

        Raises:
            ValueError: somebody has seeded the random numbers.
        """
        now = random_key()
        mx.random.seed(self._key)
        for num_draws in range(_MAX_DRAWS):
            if random_key() == now:
                self._num_draws, self._key = self._num_draws + num_draws, now
                return self._num_draws
            skip_draws(1)
        raise ValueError("the random numbers have been seeded anew")
