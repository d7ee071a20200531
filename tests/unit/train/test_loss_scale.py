from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_samples import CONFIG, TinyModel, make_plan, make_rows

from mlx_distributed.comm.base import LocalComm
from mlx_distributed.errors import TrainingError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train.loss_scale import GROWTH_STEPS, LARGEST, LOSS_SCALE, SMALLEST, LossScale, unscaled
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.trainer import Trainer

FP16 = replace(CONFIG, precision="fp16")


@given(st.integers(-14, 15), st.integers(0, GROWTH_STEPS - 1))
def test_it_comes_back_from_its_array(exponent: int, num_good: int) -> None:
    scale = LossScale(2.0**exponent, num_good)
    assert LossScale.of(scale.array) == scale


def test_it_grows_after_many_steps_and_not_beyond_the_range_of_a_logit() -> None:
    scale = LossScale(LARGEST / 2)
    for _ in range(GROWTH_STEPS - 1):
        scale = scale.after_step()
    assert scale == LossScale(LARGEST / 2, GROWTH_STEPS - 1)
    assert scale.after_step() == LossScale(LARGEST)
    assert LossScale(LARGEST, GROWTH_STEPS - 1).after_step() == LossScale(LARGEST)
    assert LossScale(8.0, 5).halved() == LossScale(4.0)
    assert not LossScale(SMALLEST).can_halve


@given(st.floats(-(2.0**20), 2.0**20, width=32).filter(lambda value: not 0 < abs(value) < 2.0**-60))
def test_a_power_of_two_changes_no_digit(value: float) -> None:
    gradients = {"weight": mx.array([value]) * 1024.0}
    assert unscaled(gradients, 1024.0)["weight"].item() == value
    assert unscaled(gradients, 1.0) is gradients


def test_it_is_a_part_of_what_ranks_share_and_is_restored() -> None:
    states = [init_state(TinyModel(), config, LocalComm()) for config in (FP16, FP16, CONFIG)]
    states[0].loss_scale = LossScale(64.0, 3)
    states[1].restore(states[0].parameters, states[0].shared, 5, 6, 0)
    assert states[1].loss_scale == LossScale(64.0, 3)
    assert LOSS_SCALE not in states[1].optimizer
    assert states[1].digest() == states[0].digest()
    assert LOSS_SCALE not in states[2].shared


def test_where_halving_does_not_help_the_run_ends() -> None:
    rows = make_rows()
    state = init_state(TinyModel(), FP16, LocalComm())
    state.loss_scale = LossScale(SMALLEST * 2)
    state.model.head.weight = state.model.head.weight * mx.inf
    trainer = Trainer(Phases(FP16, make_plan(rows), rows))
    with pytest.raises(TrainingError, match="precision=bf16, which has the range"):
        list(trainer.steps(state, Mesh(LocalComm())))
    assert state.num_skipped == 3
