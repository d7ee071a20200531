from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_distributed.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"full.yaml", "lora.yaml", "quickstart.yaml"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_loads(name: str, tmp_path: Path) -> None:
    # A copy, beside which the folder that the quick start leaves for the other examples can be put.
    configs = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
    (tmp_path / "runs" / "quickstart" / "final").mkdir(parents=True)
    config = load_config(configs / name)
    assert config.output_dir.is_relative_to(tmp_path / "runs")


def test_the_quick_start_needs_nothing_but_its_own_files() -> None:
    config = load_config(CONFIGS / "quickstart.yaml")
    assert config.model.path is None
    sources = [*config.data.train, *config.data.validation]
    assert {Path(source.path).relative_to(CONFIGS / "quickstart").name for source in sources} == {
        "alpaca.json",
        "sharegpt.json",
        "validation.json",
    }


def test_the_quick_start_can_be_run_by_one_two_or_three_workers() -> None:
    for nproc in (1, 2, 3):
        assert load_config(CONFIGS / "quickstart.yaml", [f"parallel.nproc={nproc}"]).parallel.nproc == nproc
