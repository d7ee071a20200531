"""How many workers there are, what each has, does and keeps, and gradient checkpointing change no bit of the result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import checkpoints, digest, metrics, train_all

VARIANTS = {
    "2 workers": ["--nproc", "2"],
    "3 workers": ["--nproc", "3"],
    "uneven share": ["--nproc", "3", "parallel.share=[1, 4, 1]"],
    "1 worker, sharded": ["optimizer.shard=true"],
    "2 workers, sharded": ["--nproc", "2", "optimizer.shard=true"],
    "3 workers, sharded": ["--nproc", "3", "optimizer.shard=true", "parallel.bandwidth=[1, 4, 2]"],
    "gradient checkpointing": ["train.gradient_checkpointing=true"],
}

STAGES = {
    "2 stages": ["--nproc", "2", "parallel.pipeline.num_stages=2"],
    "2 copies of 2 stages": ["--nproc", "4", "parallel.pipeline.num_stages=2", "parallel.pipeline.schedule=zb-h1"],
}
"""Where the embedding is not trained by two of them, which adds its gradient up in another order."""


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("method", [["method=lora", "lora.dropout=0.1"], ["method=full"]], ids=["lora", "full"])
def test_every_way_to_compute_gives_the_same_model(config: Path, tmp_path: Path, method: list[str], model: str) -> None:
    # Five steps, the fourth of which is the rest of an epoch.
    same = [*method, f"model.path={config.parent / model}", "train.max_steps=5", "eval.steps=2"]
    alone = tmp_path / "alone"
    variants = VARIANTS | ({} if (method[0], model) == ("method=full", "tied") else STAGES)
    train_all(config, {alone: same} | {tmp_path / name: same + variant for name, variant in variants.items()})
    assert len(metrics(alone)) == 5 + 3
    for name in variants:
        assert digest(tmp_path / name) == digest(alone), name
        assert metrics(tmp_path / name) == metrics(alone), name


def test_packed_rows_within_a_budget_too(config: Path, tmp_path: Path) -> None:
    alone, two, resumed = (tmp_path / name for name in ("alone", "two", "resumed"))
    same = ["data.packing=true", "data.max_seq_length=128", "train.micro_batch_tokens=128", "lora.dropout=0.1"]
    same += ["method=lora", "train.max_steps=5", "checkpoint.steps=2"]
    train_all(config, {alone: same, two: [*same, "--nproc", "2"]})
    shutil.copytree(alone, resumed)
    shutil.rmtree(resumed / "final")
    for folder in checkpoints(resumed)[1:]:
        shutil.rmtree(folder)
    train_all(config, {resumed: [*same, "--nproc", "3", "--resume"]})
    for folder in (two, resumed):
        assert digest(folder) == digest(alone), folder
        assert metrics(folder) == metrics(alone), folder


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_too(config: Path, tmp_path: Path, precision: str) -> None:
    alone, sharded, resumed = (tmp_path / name for name in ("alone", "sharded", "resumed"))
    same = [f"precision={precision}", "method=lora", "lora.dropout=0.1", "train.neftune_noise_alpha=5"]
    same += ["train.max_steps=5", "checkpoint.steps=2"]
    train_all(config, {alone: same, sharded: [*same, *VARIANTS["2 workers, sharded"]]})
    shutil.copytree(sharded, resumed)
    shutil.rmtree(resumed / "final")
    for folder in checkpoints(resumed)[1:]:
        shutil.rmtree(folder)
    train_all(config, {resumed: [*same, *VARIANTS["3 workers, sharded"], "--resume"]})
    assert ("train/loss_scale" in metrics(alone)[0]) == (precision == "fp16")
    for folder in (sharded, resumed):
        assert digest(folder) == digest(alone), folder
        assert metrics(folder) == metrics(alone), folder
