"""`TrainState`: everything that a step reads and writes, saved, sent and restored whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models import trainable
from mlx_distributed.parallel.adamw import DistributedAdamW


def digest(arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in name order."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        if array.size:
            sha.update(np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
    return sha.hexdigest()


@dataclass
class TrainState:
    """The trained parameters (held by the model), the optimizer's state, and the counters.

    Replaced only by `commit` and `restore`. The data cursor is `step` itself: the micro-batches of a step are a pure
    function of it.
    """

    model: nn.Module
    optimizer: Arrays
    """As from `DistributedAdamW.init`."""
    step: int = 0
    """Steps committed, those that were skipped for a loss that is not finite among them."""
    num_tokens: int = 0
    """Label tokens trained on so far."""
    num_skipped: int = 0
    """Steps skipped in a row, up to now."""
    feedback: Feedback = field(default_factory=Feedback)
    """What lossy wire formats have left out of this rank's gradients: the only part that is not the same on all."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation, if it was made at this very step; they go into the checkpoint."""

    @property
    def parameters(self) -> Arrays:
        """What is trained, by name."""
        return trainable(self.model)

    def digest(self) -> dict[str, str]:
        """SHA-256 of `params` and of `optimizer`."""
        return {"params": digest(self.parameters), "optimizer": digest(self.optimizer)}

    def commit(
        self,
        optimizer: DistributedAdamW,
        gradients: Arrays,
        scale: mx.array,
        learning_rate: float,
        num_tokens: int,
    ) -> None:
        """Take the step. Touches no other machine; `gradients` is emptied."""
        for group in optimizer.update(self.parameters, gradients, self.optimizer, scale, learning_rate):
            self.model.update(tree_unflatten(list(group.items())))
            mx.eval(group)
        self.feedback.commit()
        self.step += 1
        self.num_tokens += num_tokens
        self.num_skipped = 0
        self.metrics = {}

    def skip(self) -> None:
        """Pass over the micro-batches of this step without an update."""
        self.feedback.discard()
        self.step += 1
        self.num_skipped += 1
        self.metrics = {}

    def restore(self, parameters: Arrays, optimizer: Arrays, step: int, num_tokens: int, num_skipped: int) -> None:
        """Take over a saved state.

        Raises:
            CheckpointError: a name, a shape or a dtype is not that of the model; nothing is taken over then.
        """
        for mine, theirs in ((self.parameters, parameters), (self.optimizer, optimizer)):
            for name in sorted(mine.keys() | theirs.keys()):
                expected, found = (_kind(arrays.get(name)) for arrays in (mine, theirs))
                if expected != found:
                    raise CheckpointError(f"the saved state does not fit: {name} is {found} there and {expected} here")
        self.model.update(tree_unflatten(list(parameters.items())))
        self.optimizer = dict(optimizer)
        self.step, self.num_tokens, self.num_skipped = step, num_tokens, num_skipped
        mx.eval(self.parameters, self.optimizer)


def _kind(array: mx.array | None) -> str:
    return "missing" if array is None else f"{array.dtype}{tuple(array.shape)}"
