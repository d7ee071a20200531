"""`TrainState`: everything that a step reads and writes, saved, sent and restored whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models import trainable
from mlx_distributed.parallel.adamw import DistributedAdamW, decaying
from mlx_distributed.parallel.shard import Part
from mlx_distributed.train.loss_scale import LOSS_SCALE, LossScale
from mlx_distributed.train.pending import Pending


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
    """What all ranks have of the optimizer's state: all of it, as from `DistributedAdamW.init`, or all but `parts`."""
    step: int = 0
    """Steps committed, those that were skipped for a loss that is not finite among them."""
    num_tokens: int = 0
    """Label tokens trained on so far."""
    num_skipped: int = 0
    """Steps skipped in a row, up to now."""
    feedback: Feedback = field(default_factory=Feedback)
    """What lossy wire formats have left out of this rank's gradients."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation, if it was made at this very step; they go into the checkpoint."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """By step, what decides about early stopping (`best`), of all evaluations so far."""
    parts: list[Part] = field(default_factory=list)
    """Of a sharded optimizer: the moments that this rank owns, then those that it keeps for when their owner is lost
    (`mirrors`). Empty where all ranks have all of them."""
    pending: Pending | None = None
    """Sums that are under way and belong to a coming update."""
    inner: Inner | None = None
    """What this rank trains by itself; the parameters here are then those that all agree on, and the optimizer's state
    is that of the outer one, `outer.init_momentum`."""
    num_stages: int = 1
    """Workers that have one copy of the model between them; parameters and moments are of this one's part alone."""
    loss_scale: LossScale | None = None
    """For gradients of float16."""

    @property
    def parameters(self) -> Arrays:
        """What is trained, by name."""
        return trainable(self.model)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before it is differentiated."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    @property
    def shared(self) -> Arrays:
        """`optimizer`, and the loss scale with it."""
        return self.optimizer if self.loss_scale is None else self.optimizer | {LOSS_SCALE: self.loss_scale.array}

    def digest(self) -> dict[str, str]:
        """SHA-256 of `params` and of `optimizer`, as far as they are the same on every rank."""
        return {"params": digest(self.parameters), "optimizer": digest(self.shared)}

    def commit(
        self,
        optimizer: DistributedAdamW,
        gradients: Arrays,
        scale: mx.array,
        learning_rate: float,
        num_tokens: int,
    ) -> None:
        """Take the step, with the whole state on this rank. Touches no other machine; `gradients` is emptied."""
        parameters = self.parameters
        decayed = decaying(parameters)
        groups = optimizer.update(parameters, gradients, self.optimizer, scale, learning_rate, decayed)
        self.take(groups, num_tokens)

    def take(self, groups: Iterable[Arrays], num_tokens: int) -> None:
        """Take new parameters, group by group: the end of a step. Touches no other machine."""
        for group in groups:
            self.model.update(tree_unflatten(list(group.items())))
            mx.eval(group)
        self.feedback.commit()
        self.step += 1
        self.num_tokens += num_tokens
        self.num_skipped = 0
        self.metrics = {}
        if self.loss_scale is not None:
            self.loss_scale = self.loss_scale.after_step()

    def skip(self, overflow: bool = False) -> None:
        """Pass over the micro-batches of this step without an update.

        Args:
            overflow: every loss is finite, and the gradient is not: it may be the fault of the loss scale.
        """
        self.feedback.discard()
        self.step += 1
        self.metrics = {}
        if self.loss_scale is not None and overflow and self.loss_scale.can_halve:
            self.loss_scale = self.loss_scale.halved()  # Which is how it is found: nothing is wrong with the run.
        else:
            self.num_skipped += 1

    def restore(self, parameters: Arrays, optimizer: Arrays, step: int, num_tokens: int, num_skipped: int) -> None:
        """Take over a saved state. `optimizer` is as `shared`: `parts` stay as they are.

        Raises:
            CheckpointError: a name, a shape or a dtype is not that of the model; nothing is taken over then.
        """
        for mine, theirs in ((self.parameters, parameters), (self.shared, optimizer)):
            for name in sorted(mine.keys() | theirs.keys()):
                expected, found = (_kind(arrays.get(name)) for arrays in (mine, theirs))
                if expected != found:
                    raise CheckpointError(f"the saved state does not fit: {name} is {found} there and {expected} here")
        self.model.update(tree_unflatten(list(parameters.items())))
        if self.loss_scale is not None:
            self.loss_scale = LossScale.of(optimizer[LOSS_SCALE])
        self.optimizer |= {name: array for name, array in optimizer.items() if name != LOSS_SCALE}
        self.step, self.num_tokens, self.num_skipped = step, num_tokens, num_skipped
        mx.eval(self.parameters, self.optimizer)


@dataclass
class Inner:
    """What a rank trains by itself between two exchanges (`parallel.sync: diloco`)."""

    state: TrainState
    """Of a twin of the model, with the counters of this rank's own updates."""
    exchanged_at: list[int]
    """By fragment, how many label tokens this rank had trained on when its part of the sum was last handed over."""


def _kind(array: mx.array | None) -> str:
    return "missing" if array is None else f"{array.dtype}{tuple(array.shape)}"
