from __future__ import annotations

import pytest
from train_samples import make_state

from mlx_distributed.train.hooks import every
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import StepInfo


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, [3, 4, 5, 6, 7, 8, 9]), (3, [3, 6, 9]), (9, [9]), (10, []), (None, [])]
)
def test_a_hook_runs_when_it_is_due_wherever_the_run_began(num_steps: int | None, expected: list[int]) -> None:
    seen: list[tuple[TrainState, StepInfo]] = []
    hook, state = every(num_steps, lambda state, info: seen.append((state, info))), make_state()
    infos = {step: StepInfo(step, 1.0, 1, 1e-3, 1.0, 0.1, 0.0, False) for step in range(3, 10)}
    for info in infos.values():
        hook(state, info)
    assert seen == [(state, infos[step]) for step in expected]
