from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.config import SchedulerConfig
from mlx_distributed.train.schedule import learning_rate, num_warmup_steps

PEAK = 4e-4
SCHEDULERS = st.builds(
    SchedulerConfig,
    name=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_steps=st.none() | st.integers(0, 300),
    min_lr_ratio=st.floats(0.0, 1.0),
) | st.builds(
    SchedulerConfig,
    name=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_ratio=st.none() | st.floats(0.0, 1.0),
    min_lr_ratio=st.floats(0.0, 1.0),
)


def rates(scheduler: SchedulerConfig, num_steps: int) -> list[float]:
    return [learning_rate(scheduler, PEAK, step, num_steps) for step in range(num_steps)]


@given(SCHEDULERS, st.integers(1, 200))
def test_it_rises_to_the_peak_and_falls_to_no_less_than_the_minimum(scheduler: SchedulerConfig, num_steps: int) -> None:
    warmup = num_warmup_steps(scheduler, num_steps)
    assert 0 <= warmup < num_steps
    found = rates(scheduler, num_steps)
    assert found[warmup] == pytest.approx(PEAK)
    assert all(0.0 < rate <= PEAK * (1 + 1e-12) for rate in found)
    assert all(a < b for a, b in itertools.pairwise(found[: warmup + 1]))
    assert all(a >= b for a, b in itertools.pairwise(found[warmup:]))
    assert min(found[warmup:]) >= PEAK * scheduler.min_lr_ratio * (1 - 1e-12)


def test_shapes() -> None:
    def found(name: str, **settings: float) -> list[float]:
        return rates(SchedulerConfig(name=name, **settings), 6)

    third = PEAK / 3
    up = [third, 2 * third]
    assert found("constant", warmup_steps=2) == pytest.approx([*up, *[PEAK] * 4])
    assert found("linear", warmup_steps=2) == pytest.approx([*up, PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.25 * PEAK])
    assert found("linear", warmup_steps=2, min_lr_ratio=0.2) == pytest.approx(
        [*up, PEAK, 0.8 * PEAK, 0.6 * PEAK, 0.4 * PEAK]
    )
    cosine = [0.5 + 0.5 * math.cos(math.pi * quarter / 4) for quarter in range(4)]
    assert found("cosine", warmup_steps=2) == pytest.approx([*up, *(PEAK * factor for factor in cosine)])
    assert found("cosine", warmup_steps=2, min_lr_ratio=0.1) == pytest.approx(
        [*up, *(PEAK * (0.1 + 0.9 * factor) for factor in cosine)]
    )


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_step_after_the_last_one_has_the_final_rate(name: str) -> None:
    scheduler = SchedulerConfig(name=name, min_lr_ratio=0.1)
    assert learning_rate(scheduler, PEAK, 40, 40) == pytest.approx(0.1 * PEAK)
    assert learning_rate(scheduler, PEAK, 1000, 40) == pytest.approx(0.1 * PEAK)


@pytest.mark.parametrize(
    ("scheduler", "num_steps", "expected"),
    [
        (SchedulerConfig(), 1, 0),
        (SchedulerConfig(), 100, 3),
        (SchedulerConfig(), 101, 4),
        (SchedulerConfig(warmup_steps=0), 100, 0),
        (SchedulerConfig(warmup_steps=500), 100, 99),
        (SchedulerConfig(warmup_ratio=0.0), 100, 0),
        (SchedulerConfig(warmup_ratio=0.5), 11, 6),
        (SchedulerConfig(warmup_ratio=1.0), 10, 9),
    ],
)
def test_warmup(scheduler: SchedulerConfig, num_steps: int, expected: int) -> None:
    assert num_warmup_steps(scheduler, num_steps) == expected


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [None, 0, 10])
def test_a_run_of_one_step_takes_it_at_the_peak(name: str, warmup_steps: int | None) -> None:
    assert rates(SchedulerConfig(name=name, warmup_steps=warmup_steps), 1) == [PEAK]
