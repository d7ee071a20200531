"""How a run decides on the layers of each stage and on a schedule; the plans themselves are tested with the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_distributed.cli.plan.inputs import by_stage
from mlx_distributed.cli.plan.settle import Settled, Worker, settle, workers_of
from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config
from mlx_distributed.config.schema import ModelConfig, ParallelConfig, PipelineConfig, TrainConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import load, prepare
from mlx_distributed.testing import run_ranks, tiny_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=False, hidden_size=64, num_layers=4)


def pipeline(num_workers: int = 2, **settings: object) -> Config:
    staged = PipelineConfig(**({"num_stages": 2} | settings))  # type: ignore[arg-type]
    return replace(Config(), method="full", parallel=ParallelConfig(nproc=num_workers, pipeline=staged))


def decided(folder: Path, config: Config, comm: Communicator | None = None, *machines: str) -> Settled:
    model, _, _ = load(ModelConfig(path=str(folder)), lazy=True)
    prepare(model, config.method, config.lora, config.seed, lazy=True)
    return settle(model, config, None, comm or LocalComm(), machines)


def test_workers_on_one_machine_are_alike(folder: Path) -> None:
    settled = decided(folder, pipeline())
    assert settled.settings == replace(pipeline().parallel.pipeline, split=(2, 2))
    assert settled.reason == "pipeline: layers 0-1 | 2-3, for workers that are alike; 1f1b"


def test_who_is_said_to_be_faster_gets_more_layers(folder: Path) -> None:
    settled = decided(folder, pipeline(speeds=(4.0, 1.0)))
    assert settled.settings.split == (3, 1)
    assert settled.reason == "pipeline: layers 0-2 | 3, for speeds 4 : 1; 1f1b"
    assert decided(folder, pipeline(split=(1, 3))).reason == "pipeline: layers 0 | 1-3, as given; 1f1b"


def test_all_ranks_decide_alike_for_what_was_measured(folder: Path) -> None:
    """On two machines, which are the same one here and busy, so that any split may come of it."""
    config = pipeline(schedule="auto")
    found = run_ranks(2, lambda comm: decided(folder, config, comm, "a", "b"))
    assert found[1:] == found[:-1]
    assert isinstance(found[0], Settled), found[0]
    settings = found[0].settings
    assert settings.schedule in ("1f1b", "gpipe", "zb-h1", "interleaved")
    assert not isinstance(settings.split, str)
    assert sum(settings.split) == 4
    assert len(settings.split) == 2 * settings.chunks
    assert f"; {settings.schedule}, the fastest at " in found[0].reason
    assert found[0].reason.endswith(")")


def test_what_is_refused_is_refused_on_all_ranks(folder: Path) -> None:
    config = pipeline(split=(1, 2))
    found = run_ranks(2, lambda comm: decided(folder, config, comm))
    assert [type(each) for each in found] == [ConfigError] * 2
    assert "adds up to 3, and the model has 4 layers" in str(found[1])


def test_a_worker_without_memory_for_its_stage_is_refused(folder: Path) -> None:
    too_much = replace(pipeline(), train=TrainConfig(global_batch_size=1 << 19, micro_batch_size=1 << 19))
    with pytest.raises(ConfigError, match=r"^the run does not fit: worker 0 lacks .*; what would fit: "):
        decided(folder, too_much)


def test_speeds_are_those_of_machines() -> None:
    noisy = [Worker(GIB, flops) for flops in (2e9, 1.9e9, 1.05e9, 1e9)]
    config = pipeline(4)
    assert workers_of(config, noisy, 2, 1.0).speeds == pytest.approx((1.025 / 1.95, 1.025 / 1.95))
    assert workers_of(config, noisy, 1, 1.0).speeds == (1.0, 1.0)
    assert workers_of(pipeline(4, speeds=(3.0, 1.0, 2.0, 2.0)), noisy, 2, 1.0).speeds == (2.0, 1.0)
    crossed = [noisy[rank] for rank in (0, 2, 1, 3)]
    fast, slow = workers_of(config, crossed, 2, 1.0).speeds
    assert fast / slow == pytest.approx(1.95 / 1.025)
    assert workers_of(config, [Worker(rank * GIB, 1e9) for rank in (1, 4, 3, 2)], 2, 1.0).memory_bytes == (GIB, 2 * GIB)


def test_the_slowest_worker_of_a_stage_counts() -> None:
    assert by_stage([3, 1, 2, 2, 5, 4], 2) == (2, 1)
