"""`LossScale`: what keeps the gradients of a model that computes in float16 within its range.

The summed loss of a micro-batch is multiplied by the scale before it is differentiated, and the float32 gradients are
divided by it at once, so that nothing else ever sees it. All workers know from the norm of the sum over all of them
whether a gradient was too large somewhere: none takes the step, and each halves the scale. A power of two changes no
digit.

Source:
    Micikevicius et al. 2018, "Mixed Precision Training"; factors and interval as in `torch.amp.GradScaler`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.buckets import Arrays

LOSS_SCALE = "loss_scale"
"""Its name among what all ranks share of the optimizer's state."""
INITIAL = 2.0**10
"""On a sum of losses; GradScaler's 2**16 is on the mean of, say, 64 of them."""
LARGEST = 2.0**15
"""The gradient of a logit can be as large as the scale, and float16 ends at 65504."""
SMALLEST = 2.0**-14
"""Below, something else is wrong."""
GROWTH_STEPS = 2000


@dataclass(frozen=True)
class LossScale:
    """The same on every rank, and a part of the state."""

    value: float = INITIAL
    num_good: int = 0
    """Steps taken with it."""

    @classmethod
    def of(cls, array: mx.array) -> LossScale:
        """What `array` has given."""
        value, num_good = np.asarray(array).tolist()
        return cls(value, int(num_good))

    @property
    def array(self) -> mx.array:
        """Float32 [2]."""
        return mx.array([self.value, self.num_good], mx.float32)

    @property
    def can_halve(self) -> bool:
        """Whether a gradient that is too large may be the fault of the scale."""
        return self.value > SMALLEST

    def after_step(self) -> LossScale:
        """When a step was taken: after many, twice as large."""
        if self.num_good + 1 < GROWTH_STEPS:
            return replace(self, num_good=self.num_good + 1)
        return LossScale(min(2 * self.value, LARGEST))

    def halved(self) -> LossScale:
        """When a gradient was too large."""
        return LossScale(self.value / 2)


def unscaled(gradients: Arrays, scale: float) -> Arrays:
    """Gradients of a loss that was multiplied by `scale`; not evaluated."""
    return gradients if scale == 1.0 else {name: gradient * (1 / scale) for name, gradient in gradients.items()}
