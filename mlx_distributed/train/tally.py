"""`Tally`: losses and label tokens by micro-batch, reduced in the canonical order."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.tree_sum import Node, TreeSum

PREFIX = "tally."
"""No parameter of a model begins with this, so a tally can travel with the gradients."""


@dataclass
class Tally:
    """One entry per micro-batch of a step, zero where this rank has not computed it.

    As every entry is nonzero on one rank at most, adding tallies is exact, and a loss that is not finite can be traced
    to its micro-batch.
    """

    losses: np.ndarray
    """float32 [M]; nats, summed over the label tokens of the micro-batch."""
    num_tokens: np.ndarray
    """int64 [M]; label tokens."""
    stop: bool = False
    """Some rank wants to stop after this step."""

    @classmethod
    def empty(cls, num_microbatches: int) -> Tally:
        return cls(np.zeros(num_microbatches, np.float32), np.zeros(num_microbatches, np.int64))

    @classmethod
    def pop(cls, arrays: Arrays) -> Tally:
        """Take the tally out of what `part` has put in."""
        loss, num_tokens, stop = (np.array(arrays.pop(PREFIX + name)) for name in ("loss", "num_tokens", "stop"))
        return cls(loss, num_tokens, bool(stop.any()))

    def part(self, node: Node) -> Arrays:
        """The entries of the micro-batches below a node of the summation tree, zero elsewhere."""
        here = np.zeros(len(self.losses), bool)
        here[slice(*node)] = True
        return {
            PREFIX + "loss": mx.array(np.where(here, self.losses, np.float32(0.0))),
            PREFIX + "num_tokens": mx.array(np.where(here, self.num_tokens, 0)),
            PREFIX + "stop": mx.array([int(self.stop)], mx.int64),
        }

    @property
    def total_tokens(self) -> int:
        return int(self.num_tokens.sum())

    @property
    def mean_loss(self) -> float:
        """Nats per label token, the losses added along the tree."""
        tree: TreeSum[np.float32] = TreeSum(len(self.losses))
        for i, loss in enumerate(self.losses):
            tree.put((i, i + 1), loss)
        return float(tree.total) / self.total_tokens

    def first_not_finite(self) -> int | None:
        """The first micro-batch whose loss is infinite or not a number."""
        bad = np.flatnonzero(~np.isfinite(self.losses))
        return int(bad[0]) if bad.size else None
