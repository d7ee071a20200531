"""A model of four layers that is cut into stages, and runs of it that take milliseconds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import numpy as np
from train_samples import CONFIG, make_plan

from mlx_distributed.cli.stages import Staged, cut_into_stages, make_mesh
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.data.tokenize import Row
from mlx_distributed.models import add_noise, checkpoint_layers, compute_in, isolate, load, prepare
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.testing import tiny_model
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import init_state
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

NUM_LAYERS, VOCAB_SIZE = 4, 200


@cache
def model_folder(tied: bool) -> Path:
    return tiny_model(Path(mkdtemp()) / "model", num_layers=NUM_LAYERS, tied=tied)


def make_rows(num_rows: int = 21) -> list[Row]:
    """Of 3 to 12 tokens; one of them has a single target, the fewest there can be."""
    random = np.random.default_rng(1)
    rows = []
    for length in random.integers(3, 13, num_rows):
        loss_mask = random.random(length) < 0.5
        loss_mask[0], loss_mask[1] = False, True
        rows.append(Row(random.integers(0, VOCAB_SIZE, length).astype(np.int32), loss_mask))
    return rows


def staged(num_stages: int, method: str = "full", **pipeline: object) -> Config:
    settings = replace(CONFIG.parallel.pipeline, num_stages=num_stages, **pipeline)  # type: ignore[arg-type]
    if settings.split == "auto":
        edges = [NUM_LAYERS * i // (num_stages * settings.chunks) for i in range(num_stages * settings.chunks + 1)]
        settings = replace(settings, split=tuple(stop - start for start, stop in pairwise(edges)))
    return replace(CONFIG, method=method, parallel=replace(CONFIG.parallel, pipeline=settings))  # type: ignore[arg-type]


def make_run(
    config: Config, comm: Communicator, tied: bool = False, num_steps: int = 20
) -> tuple[TrainState, Trainer, Mesh, Staged | None]:
    """One rank of a run: its part of the model, and what trains it."""
    mesh = make_mesh(config, comm, "run-of-a-test")
    lora = replace(config.lora, rank=4, dropout=0.1) if config.method == "lora" else LoraConfig()
    model, _, _ = load(replace(config, model=ModelConfig(path=str(model_folder(tied)))).base, lazy=True)
    prepare(model, config.method, lora, config.seed, lazy=True)
    compute_in(model, config.precision)
    settings = config.parallel.pipeline
    cut = cut_into_stages(model, config, settings, mesh.pp) if settings.num_stages > 1 else None
    parts = [model] if cut is None else [*cut.pipeline.stages.values()]
    model = model if cut is None else cut.model
    for part in parts:
        if config.data.packing:
            isolate(part)
        if config.train.neftune_noise_alpha is not None:
            add_noise(part, config.train.neftune_noise_alpha)
        if config.train.gradient_checkpointing:
            checkpoint_layers(part)
    model.train()
    mx.eval(model.state if cut is None else model.parameters())
    state = init_state(model, config, comm)
    state.num_stages = mesh.pp.size
    mx.eval(state.parameters, state.optimizer)
    rows = make_rows()
    phases = Phases if cut is None else cut.phases
    plan = make_plan(rows, config, num_steps)
    return state, Trainer(phases(config, plan, rows, lambda: False)), mesh, cut


def close(mesh: Mesh, comm: Communicator) -> None:
    """Leave the groups of the axes, when all have come so far."""
    comm.barrier("the end")
    for group in (mesh.dp, mesh.pp):
        if group is not comm:
            group.close()
