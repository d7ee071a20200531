"""What happens after a commit: `hook(state, info)`, which may read the state and never reaches into the trainer."""

from __future__ import annotations

from collections.abc import Callable

from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import StepInfo

Hook = Callable[[TrainState, StepInfo], None]


def every(num_steps: int | None, hook: Hook) -> Hook:
    """Run the hook after every so many steps; never where `num_steps` is None."""

    def hook_when_due(state: TrainState, info: StepInfo) -> None:
        if num_steps is not None and info.step % num_steps == 0:
            hook(state, info)

    return hook_when_due
