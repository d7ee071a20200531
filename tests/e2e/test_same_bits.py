"""The number of workers, how they share the work, and gradient checkpointing do not change a bit of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import digest, metrics, train

LORA = ["method=lora", "lora.dropout=0.1"]
FULL = ["method=full"]
GROUPS = {
    "2 workers": ["--nproc", "2"],
    "3 workers": ["--nproc", "3"],
    "uneven share": ["--nproc", "3", "parallel.share=[1, 4, 1]"],
    "nothing for one": ["--nproc", "3", "parallel.share=[2, 0, 1]"],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_any_group_trains_the_same_model(config: Path, tmp_path: Path, method: list[str], model: str) -> None:
    # Five steps, the fourth of which is the rest of an epoch.
    same = [f"model.path={config.parent / model}", *method, "train.max_steps=5", "eval.steps=2"]
    alone = tmp_path / "alone"
    done = train(config, *same, "--nproc", "1", "--output-dir", alone)
    assert done.status == 0, done
    assert len(metrics(alone)) == 5 + 3
    for name, arguments in GROUPS.items():
        folder = tmp_path / name
        done = train(config, *same, *arguments, "--output-dir", folder)
        assert done.status == 0, done
        assert digest(folder) == digest(alone), name
        assert metrics(folder) == metrics(alone), name


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_gradient_checkpointing_trains_the_same_model(config: Path, tmp_path: Path, method: list[str]) -> None:
    digests = set()
    for setting in ("false", "true"):
        folder = tmp_path / setting
        done = train(
            config, *method, "train.max_steps=5", f"train.gradient_checkpointing={setting}", "--output-dir", folder
        )
        assert done.status == 0, done
        digests.add(digest(folder))
    assert len(digests) == 1
