"""In 16 bits, and with noise, any number of workers and stages gives the same bits, and an overflow stops nobody."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from staged_samples import close, make_rows, make_run, staged
from train_samples import on_ranks

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.config import Config, OptimizerConfig
from mlx_distributed.data.batch import Batch, by_length
from mlx_distributed.parallel.adamw import STEP
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train import attempts
from mlx_distributed.train.evaluation import evaluate_loss
from mlx_distributed.train.loss_scale import INITIAL, LossScale
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.state import TrainState, digest

NUM_STEPS = 4
PLAIN = staged(1)
PACKED = replace(PLAIN.data, packing=True)
SHARDED = replace(PLAIN.optimizer, shard=True)
NOISY = replace(PLAIN.train, neftune_noise_alpha=5.0)
CHECKPOINTED = replace(NOISY, gradient_checkpointing=True)
TWO_STAGES = staged(2).parallel
KEPT = staged(3, activations="keep", schedule="zb-h1").parallel


def trained(config: Config, size: int, begin: LossScale | None = None) -> tuple[list[object], dict[str, str], float]:
    """What was told of the steps, digests of what is trained and of its moments, and an evaluation."""

    def body(comm: Communicator) -> tuple[list[object], Arrays, Arrays, float]:
        state, trainer, mesh, cut = make_run(config, comm, num_steps=NUM_STEPS)
        state.loss_scale = begin or state.loss_scale
        told = [(info.loss, str(info.grad_norm), info.skipped) for info in trainer.steps(state, mesh)]
        scale = state.scale, state.num_skipped
        loss = evaluate_loss(state.model, by_length(make_rows(5), 2), mesh.dp, cut.pipeline if cut else None)[
            "eval/loss"
        ]
        close(mesh, comm)
        parameters, moments = state.parameters, {n: array for n, array in state.optimizer.items() if n != STEP}
        mx.eval(parameters, moments)
        assert all(array.dtype == mx.float32 for array in parameters.values())
        return [*told, scale], parameters, moments, loss

    found = on_ranks(size, body)
    assert all(told == found[0][0] for told, *_ in found)
    assert len({loss for *_, loss in found}) == 1
    parameters = {name: array for _, own, _, _ in found for name, array in own.items()}
    moments = {name: array for _, _, own, _ in found for name, array in own.items()}
    return found[0][0], {"params": digest(parameters), "moments": digest(moments)}, found[0][3]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_any_workers_and_stages_give_the_same_bits(precision: str, method: str) -> None:
    config = replace(PLAIN, method=method, precision=precision, train=NOISY)  # type: ignore[arg-type]
    alone = trained(config, 1)
    variants = [
        (config, 2),
        (replace(config, train=CHECKPOINTED), 1),
        (replace(config, parallel=TWO_STAGES), 4),
        (replace(config, parallel=KEPT), 3),
    ]
    for variant, size in variants:
        assert trained(variant, size) == alone, (variant.parallel.pipeline, size)
    sharded = trained(replace(config, optimizer=SHARDED), 3)
    assert (sharded[0], sharded[1]["params"], sharded[2]) == (alone[0], alone[1]["params"], alone[2])


def test_16_bits_are_close_to_fp32_and_are_not_it() -> None:
    losses = {name: trained(replace(PLAIN, precision=name), 1)[0] for name in ("fp32", "bf16", "fp16")}  # type: ignore[arg-type]
    last = {name: told[-2][0] for name, told in losses.items()}  # type: ignore[index]
    assert len(set(last.values())) == 3
    assert last["bf16"] == pytest.approx(last["fp32"], rel=1e-2)
    assert last["fp16"] == pytest.approx(last["fp32"], rel=1e-3)


def test_packed_rows_have_noise_of_their_own_length() -> None:
    packed, noisy = replace(PLAIN, data=PACKED), replace(PLAIN, data=PACKED, train=NOISY)
    alone = trained(noisy, 1)
    assert trained(noisy, 2) == alone
    assert trained(replace(noisy, parallel=TWO_STAGES), 2) == alone
    assert trained(packed, 1) != alone


@pytest.mark.parametrize(
    ("parallel", "optimizer", "size"),
    [
        (PLAIN.parallel, PLAIN.optimizer, 1),
        (PLAIN.parallel, PLAIN.optimizer, 3),
        (PLAIN.parallel, SHARDED, 2),
        (TWO_STAGES, PLAIN.optimizer, 4),
        (replace(PLAIN.parallel, sync="delayed"), PLAIN.optimizer, 2),
    ],
    ids=["1 worker", "3 workers", "sharded", "2 copies of 2 stages", "delayed"],
)
def test_all_leave_out_a_step_whose_gradient_is_too_large(parallel, optimizer, size) -> None:  # type: ignore[no-untyped-def]
    config = replace(PLAIN, precision="fp16", parallel=parallel, optimizer=optimizer)
    told, _, _ = trained(config, size, LossScale(2.0**24))
    *steps, (scale, num_skipped) = told  # type: ignore[misc]
    skipped = [step[2] for step in steps]
    assert "though every loss is finite" in skipped[0]
    assert all(np.isfinite(step[0]) for step in steps)
    assert scale == 2.0**24 / 2 ** sum(map(bool, skipped))
    assert num_skipped == 0


class Overflowing(Phases):
    """One rank of which has too large a gradient in the second step."""

    def gradients(
        self, state: TrainState, batch: Batch, step: int, index: int, part: int = 0
    ) -> tuple[mx.array, Arrays]:
        loss, gradients = super().gradients(state, batch, step, index, part)
        if (step, index) == (1, 4):
            gradients = {name: gradient * mx.inf for name, gradient in gradients.items()}
        return loss, gradients


def test_an_overflow_on_one_worker_is_survived_by_all_in_the_same_step() -> None:
    config = replace(PLAIN, precision="fp16")

    def body(comm: Communicator) -> tuple[list[int], float, dict[str, str], int]:
        state, trainer, mesh, _ = make_run(config, comm, num_steps=NUM_STEPS)
        trainer.phases = Overflowing(config, trainer.phases.plan, trainer.phases.rows)
        before = digest(state.parameters)
        skipped, digests = [], [before]
        while state.step < NUM_STEPS:
            if trainer.train_step(state, Mesh(mesh.dp)).skipped:
                skipped.append(state.step)
            digests.append(digest(state.parameters))
        assert digests[1] == digests[2] != digests[3]
        close(mesh, comm)
        return skipped, state.scale, state.digest(), state.num_tokens

    found = on_ranks(3, body)
    assert found == [found[0]] * 3
    assert found[0][:2] == ([2], INITIAL / 2)


@pytest.mark.parametrize("optimizer", [PLAIN.optimizer, SHARDED], ids=["replicated", "sharded"])
def test_members_of_an_elastic_run_leave_it_out_too_and_who_hears_of_it_later(optimizer: OptimizerConfig) -> None:
    config = replace(PLAIN, precision="fp16", optimizer=optimizer)

    def body(comm: Communicator) -> tuple[dict[str, str], LossScale | None, int]:
        states = []
        for _ in range(2):
            state, trainer, _, _ = make_run(config, comm, num_steps=NUM_STEPS)
            state.loss_scale = LossScale(2.0**24)
            states.append(state)
        member, newcomer = states
        attempts.enter(trainer.phases, member, comm)
        attempt = attempts.begin(trainer.phases, member)
        attempt.reduce(range(3 * comm.rank, 3 + 2 * comm.rank), comm)
        sums = dict(attempt.sums)
        assert attempt.commit().skipped is not None
        attempts.replay(trainer.phases, newcomer, sums)
        assert (newcomer.digest(), newcomer.num_skipped) == (member.digest(), 0)
        assert newcomer.loss_scale == LossScale(2.0**23)
        return member.digest(), member.loss_scale, member.num_skipped

    found = on_ranks(2, body)
    assert found == [found[0]] * 2
    assert found[0][1:] == (LossScale(2.0**23), 0)
