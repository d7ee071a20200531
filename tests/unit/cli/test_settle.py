"""How a run decides on the layers of each stage and on a schedule; the plans themselves are tested with the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_distributed.cli.plan.inputs import by_stage
from mlx_distributed.cli.plan.settle import Settled, Worker, decide, settle, workers_of
from mlx_distributed.cli.stages import make_schedule
from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import Config
from mlx_distributed.config.schema import DataConfig, ModelConfig, ParallelConfig, PipelineConfig, TrainConfig
from mlx_distributed.errors import ConfigError
from mlx_distributed.models import load, prepare
from mlx_distributed.parallel.choose import numbers_in_flight
from mlx_distributed.parallel.simulate import Costs, StageCosts, simulate
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


def told(folder: Path, link_bytes_per_s: float, memory_bytes: int = GIB, **settings: object) -> Settled:
    """What a run decides on four workers of 1 GFLOP/s each; their speed and links are not those of this machine."""
    config = pipeline(4, num_stages=4, schedule="auto", activations="keep", **settings)
    train, data = TrainConfig(global_batch_size=16, micro_batch_size=1), DataConfig(max_seq_length=65)
    config = replace(config, train=train, data=data)
    model, _, _ = load(ModelConfig(path=str(folder)), lazy=True)
    prepare(model, config.method, config.lora, config.seed, lazy=True)
    workers = workers_of(config, [Worker(memory_bytes, 1e9)] * 4, 1, link_bytes_per_s)
    return decide(model, config, None, workers)


def test_auto_chooses_how_many_are_in_flight(folder: Path) -> None:
    """By the links, within the memory, and never against the user."""
    fast, slow = told(folder, 1e9), told(folder, 2e6)
    assert fast.settings.in_flight == "auto"
    assert (
        "; 4 micro-batches in flight on the first worker: no other number that fits is faster by more than 1% ("
        in fast.reason
    )
    assert not isinstance(slow.settings.in_flight, str)
    assert 4 < slow.settings.in_flight <= 13
    said = f"; {slow.settings.in_flight} micro-batches in flight on the first worker: 4 would take "
    assert said in slow.reason
    fixed = told(folder, 2e6, in_flight=5)
    assert fixed.settings.in_flight == 5
    assert "in flight" not in fixed.reason


@pytest.mark.parametrize(
    ("link_s", "textbook", "raised"), [(0, 0.84, 0.84), (0.3, 0.73, 0.81), (1, 0.56, 0.76), (4, 0.28, 0.48)]
)
def test_one_of_the_numbers_in_flight_hides_the_links(link_s: float, textbook: float, raised: float) -> None:
    """Share of the time that four equal workers work in a step of 16 micro-batches, with F = B = W = 1."""
    costs = Costs((StageCosts(1, 1, 1),) * 4, (link_s,) * 3)
    settings = [PipelineConfig(num_stages=4, in_flight=number) for number in numbers_in_flight(4, 16)]
    found = [simulate(make_schedule(each, 4, 16), costs).efficiency for each in settings]
    assert found[0] == pytest.approx(textbook, abs=0.006)
    assert max(found) >= raised
    assert numbers_in_flight(4, 6) == [4, 5, 6]
    assert numbers_in_flight(2, 1) == [2]


def test_a_dry_run_takes_links_for_those_of_one_machine(folder: Path) -> None:
    assert " GFLOP/s and 10 Gbit/s: " in decided(folder, pipeline(schedule="auto")).reason


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
