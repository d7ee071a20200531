"""A model that is cut into stages is trained to the bits of the model in one piece, by any schedule."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from staged_samples import close, make_rows, make_run, model_folder, staged
from train_samples import CONFIG, make_plan, on_ranks

from mlx_distributed.cli.plan.settle import settle
from mlx_distributed.cli.stages import make_schedule
from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config
from mlx_distributed.config.schema import ModelConfig, ParallelConfig, PipelineConfig
from mlx_distributed.data.batch import by_length
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import load
from mlx_distributed.parallel.simulate import Costs, StageCosts, simulate
from mlx_distributed.parallel.validate import count_in_flight
from mlx_distributed.train.evaluation import evaluate_loss
from mlx_distributed.train.state import digest
from mlx_distributed.train.step_info import StepInfo

NUM_STEPS = 20


def told(info: StepInfo) -> tuple[object, ...]:
    return info.step, info.loss, info.num_tokens, info.learning_rate, info.grad_norm, info.skipped


def train(
    config: Config, size: int, tied: bool = False, num_steps: int = NUM_STEPS
) -> tuple[list[tuple[object, ...]], dict[str, np.ndarray], dict[str, float]]:
    """What was told of the steps, all parameters and moments at the end, and an evaluation."""

    def body(comm: Communicator) -> tuple[list[tuple[object, ...]], dict[str, np.ndarray], dict[str, float]]:
        state, trainer, mesh, cut = make_run(config, comm, tied, num_steps)
        infos = [told(info) for info in trainer.steps(state, mesh)]
        pipeline = cut.pipeline if cut else None
        metrics = evaluate_loss(state.model, by_length(make_rows(9), 2), mesh.dp, pipeline)
        arrays = {name: np.array(array) for name, array in (state.parameters | state.optimizer).items()}
        close(mesh, comm)
        return infos, arrays, metrics

    found = on_ranks(size, body)
    arrays: dict[str, np.ndarray] = {}
    for infos, own, metrics in found:
        assert infos == found[0][0]
        assert metrics == found[0][2]
        for name, array in own.items():
            assert name not in arrays or arrays[name].tobytes() == array.tobytes(), name
        arrays |= own
    return found[0][0], arrays, found[0][2]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return digest({name: mx.array(array) for name, array in found.items()}) == digest(
        {name: mx.array(array) for name, array in expected.items()}
    )


@pytest.fixture(scope="module", params=["full", "lora"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(method: str) -> tuple[list[tuple[object, ...]], dict[str, np.ndarray], dict[str, float]]:
    return train(staged(1, method), 1)


@pytest.mark.parametrize(
    ("size", "num_stages", "settings"),
    [
        (2, 2, {}),
        (3, 3, {"schedule": "gpipe"}),
        (4, 4, {"schedule": "zb-h1", "activations": "keep"}),
        (2, 2, {"schedule": "interleaved", "chunks": 2}),
        (2, 2, {"split": (1, 3), "activations": "keep"}),
        (4, 2, {"schedule": "zb-h1"}),
    ],
    ids=str,
)
def test_every_schedule_trains_the_same_bits(
    method: str,
    whole: tuple[list[tuple[object, ...]], dict[str, np.ndarray], dict[str, float]],
    size: int,
    num_stages: int,
    settings: dict[str, object],
) -> None:
    infos, arrays, metrics = train(staged(num_stages, method, **settings), size)
    assert infos == whole[0]
    assert same(arrays, whole[1])
    assert metrics == whole[2]


LAYOUTS: dict[str, dict[str, object]] = {
    "packed": {"packing": True},
    "packed tokens": {"packing": True, "micro_batch_tokens": 32},
    "tokens": {"micro_batch_tokens": 32},
}


def laid_out(config: Config, packing: bool = False, micro_batch_tokens: int | None = None, **train: bool) -> Config:
    train_config = replace(config.train, micro_batch_tokens=micro_batch_tokens, **train)
    return replace(config, data=replace(config.data, packing=packing), train=train_config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_and_budgets_train_the_same_bits_on_any_workers(method: str, layout: str) -> None:
    expected_infos, expected, expected_metrics = train(laid_out(staged(1, method), **LAYOUTS[layout]), 1, num_steps=4)  # type: ignore[arg-type]
    for size, config in {
        2: staged(2, method, schedule="zb-h1", activations="keep"),
        3: staged(1, method),
        4: staged(2, method, schedule="interleaved", chunks=2),
    }.items():
        checkpointing = {"gradient_checkpointing": size != 2}
        infos, arrays, metrics = train(laid_out(config, **LAYOUTS[layout], **checkpointing), size, num_steps=4)  # type: ignore[arg-type]
        assert infos == expected_infos
        assert same(arrays, expected)
        assert metrics == expected_metrics


def test_packing_trains_what_is_trained_without_it() -> None:
    """Up to rounding, which the eight weights that see it first amplify."""
    expected, _, _ = train(staged(1), 1, num_steps=3)
    infos, _, _ = train(laid_out(staged(1), packing=True), 1, num_steps=3)
    for (_, loss, num_tokens, _, norm, _), (_, other_loss, other_tokens, _, other_norm, _) in zip(
        infos, expected, strict=True
    ):
        assert num_tokens == other_tokens
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def test_adapters_in_the_last_layer_alone() -> None:
    """The first worker has nothing to train, and no gradient to send."""

    def with_adapters(num_stages: int) -> Config:
        config = staged(num_stages, "lora")
        return replace(config, lora=replace(config.lora, num_layers=1))

    infos, arrays, metrics = train(with_adapters(2), 2, num_steps=5)
    expected_infos, expected, expected_metrics = train(with_adapters(1), 1, num_steps=5)
    assert (infos, metrics) == (expected_infos, expected_metrics)
    assert same(arrays, expected)


def test_tied_embeddings_are_the_same_on_both_ends_and_nearly_those_of_one_piece() -> None:
    infos, arrays, _ = train(staged(2), 2, tied=True, num_steps=3)
    expected_infos, expected, _ = train(staged(1), 1, tied=True, num_steps=3)
    assert arrays.keys() == expected.keys()
    for (_, loss, _, _, norm, _), (_, expected_loss, _, _, expected_norm, _) in zip(infos, expected_infos, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-6)
    for name, array in arrays.items():
        if name.endswith(".m"):
            assert np.linalg.norm(array - expected[name]) <= 1e-5 * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize(
    ("wire_dtype", "activations", "rel"), [("bf16", "recompute", 1e-3), ("int8", "keep", 1e-2)], ids=str
)
def test_what_travels_may_be_rounded(wire_dtype: str, activations: str, rel: float) -> None:
    infos, _, metrics = train(staged(2, wire_dtype=wire_dtype, activations=activations), 2, num_steps=3)
    again, _, _ = train(staged(2, wire_dtype=wire_dtype, schedule="zb-h1"), 2, num_steps=3)
    assert infos == again
    expected, _, expected_metrics = train(staged(1), 1, num_steps=3)
    for (_, loss, _, _, norm, _), (_, expected_loss, _, _, expected_norm, _) in zip(infos, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=rel)
        assert norm == pytest.approx(expected_norm, rel=10 * rel)
    assert metrics["eval/loss"] == pytest.approx(expected_metrics["eval/loss"], rel=rel)


def test_these_runs_have_steps_of_fewer_micro_batches_than_stages() -> None:
    plan = make_plan(make_rows(), CONFIG, NUM_STEPS)
    assert min(len(plan.microbatches(step)) for step in range(NUM_STEPS)) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_stages": 5}, "5 stages for 4 layers"),
        ({"num_stages": 2, "split": (1, 2)}, "split"),
        ({"num_stages": 2, "split": (4, 0)}, "split"),
    ],
)
def test_what_cannot_be_cut_is_refused(settings: dict[str, object], words: str) -> None:
    pipeline = PipelineConfig(**settings)  # type: ignore[arg-type]
    config = replace(CONFIG, parallel=ParallelConfig(nproc=pipeline.num_stages, pipeline=pipeline))
    model, _, _ = load(ModelConfig(path=str(model_folder(False))), lazy=True)
    with pytest.raises(ConfigError, match=words):
        settle(model, config, None, LocalComm())


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
def test_one_worker_is_a_pipeline_of_one_stage(schedule: str) -> None:
    settings = staged(1, schedule=schedule).parallel.pipeline
    assert make_schedule(settings, 1, 3).num_stages == 1


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({"schedule": "1f1b"}, (7, 5, 3, 1)),
        ({"schedule": "1f1b", "in_flight": 4}, (4, 3, 2, 1)),
        ({"schedule": "1f1b", "activations": "keep"}, (4, 3, 2, 1)),
        ({"schedule": "zb-h1", "activations": "keep"}, (4, 4, 4, 4)),
        ({"schedule": "gpipe"}, (16, 16, 16, 16)),
    ],
    ids=str,
)
def test_as_many_are_in_flight_as_the_settings_say(settings: dict[str, object], held: tuple[int, ...]) -> None:
    schedule = make_schedule(staged(4, **settings).parallel.pipeline, 4, 16)  # type: ignore[arg-type]
    assert count_in_flight(schedule) == held


@pytest.mark.parametrize(("link_s", "least"), [(0.0, 0.84), (0.3, 0.80), (1.0, 0.72)])
def test_one_stage_after_the_other_hides_its_links(link_s: float, least: float) -> None:
    schedule = make_schedule(staged(4).parallel.pipeline, 4, 16)
    assert simulate(schedule, Costs((StageCosts(1.0, 1.0, 1.0),) * 4, (link_s,) * 3)).efficiency >= least
