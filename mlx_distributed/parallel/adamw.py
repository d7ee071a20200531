"""`DistributedAdamW`: AdamW on the parameters that a rank updates: all of them, or the segments that it owns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_distributed.comm.buckets import Arrays

STEP = "step"
"""In the optimizer's state, the number of updates so far."""
MOMENTS = ("m", "v")
"""In the optimizer's state, what follows the name of a parameter and a dot."""
GROUP_BYTES = 64 << 20
"""Parameters are updated this many bytes at a time, so that old and new values do not all live at once."""


def decays(name: str, parameter: mx.array) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return parameter.ndim >= 2 and not name.endswith(("bias", "biases"))


def decaying(parameters: Mapping[str, mx.array]) -> frozenset[str]:
    """Names of the parameters that weight decay applies to, given whole."""
    return frozenset(name for name, parameter in parameters.items() if decays(name, parameter))


@dataclass(frozen=True)
class DistributedAdamW:
    """AdamW (Loshchilov and Hutter, 2019) with bias correction, float32 moments and decoupled decay.

    With decay on every parameter it computes the same bits as `mlx.optimizers.AdamW(bias_correction=True)`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def init(self, parameters: Mapping[str, mx.array]) -> Arrays:
        """The state before the first step: `step`, and `<name>.m`, `<name>.v` shaped as each parameter, float32."""
        state = {STEP: mx.array(0, mx.uint64)}
        for name, parameter in parameters.items():
            for moment in MOMENTS:
                state[f"{name}.{moment}"] = mx.zeros(parameter.shape, mx.float32)
        return state

    def update(
        self,
        parameters: Arrays,
        gradients: Arrays,
        state: Arrays,
        scale: mx.array,
        learning_rate: float,
        decayed: Collection[str],
    ) -> Iterator[Arrays]:
        """One step, a group of parameters at a time.

        Both `parameters` and `gradients` are emptied and `state` gets new arrays on the way: a second copy of them
        would be the largest allocation of the step. The caller evaluates a group before it asks for the next.

        Args:
            parameters: float32; of each all elements, or any flat segment, which gets the same bits.
            gradients: of the same names and shapes.
            state: as from `init`.
            scale: scalar that every gradient is multiplied by first.
            learning_rate: of this step.
            decayed: names of the parameters that weight decay applies to (`decaying`).

        Yields:
            Groups of new parameters, not yet evaluated; evaluating them evaluates their part of the state too.
        """
        step = state[STEP] = state[STEP] + 1
        rate = mx.array(learning_rate, mx.float32)
        group: Arrays = {}
        num_bytes = 0
        for name in list(parameters):
            parameter, gradient = parameters.pop(name), gradients.pop(name)
            group[name], state[f"{name}.m"], state[f"{name}.v"] = self._update_one(
                parameter,
                gradient * scale,
                state[f"{name}.m"],
                state[f"{name}.v"],
                step,
                rate,
                self.weight_decay if name in decayed else 0.0,
            )
            num_bytes += parameter.nbytes
            del parameter, gradient
            if num_bytes >= GROUP_BYTES:
                yield group
                group, num_bytes = {}, 0
        if group:
            yield group

    def _update_one(
        self,
        parameter: mx.array,
        gradient: mx.array,
        m: mx.array,
        v: mx.array,
        step: mx.array,
        rate: mx.array,
        decay: float,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Operations in the order of `mlx.optimizers.AdamW`: another order gives other bits."""
        b1, b2 = self.betas
        if decay:
            parameter = parameter * (1 - rate * decay)
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * mx.square(gradient)
        c1 = (rate / (1 - b1**step)).astype(mx.float32)
        c2 = mx.rsqrt(1 - b2**step).astype(mx.float32)
        return parameter - (c1 * m) / (mx.sqrt(v) * c2 + self.eps), m, v
