"""`mlx-train --eval-only`: one rank of an evaluation. Nothing is trained, and of the run nothing is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.measure import make_evaluate
from mlx_distributed.cli.output_dir import EVALUATION
from mlx_distributed.cli.report import sample_lines
from mlx_distributed.cli.run import Job, choose_device, leaving, load_state, make_checkpointer
from mlx_distributed.cli.stages import named
from mlx_distributed.comm.base import Communicator
from mlx_distributed.errors import CommError, ConfigError
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import ConsoleTracker, Trackers
from mlx_distributed.tracking.jsonl import without_gaps
from mlx_distributed.train import stage_files
from mlx_distributed.train.agreement import synchronise
from mlx_distributed.train.state import TrainState


def evaluate_only(job: Job, comm: Communicator, mesh: Mesh) -> int:
    """Evaluate a checkpoint of a run, or the model that it begins with; returns the exit status.

    Rank 0 prints the figures and writes them into `eval.json`, with all answers that were generated.

    Args:
        job: `resume` names the checkpoint; None stands for the model before training.
        comm: of all ranks.
        mesh: its axes.

    Raises:
        CheckpointError, ConfigError: there is no such checkpoint, or it is not of this run; or there are no validation
            rows.
    """
    with leaving(comm, mesh):
        choose_device(job.config.train.device)
        try:
            return _evaluate(job, comm, mesh)
        except CommError as lost:
            raise named(lost, comm, mesh) from None


def _evaluate(job: Job, comm: Communicator, mesh: Mesh) -> int:
    config = job.config
    loaded = load_all(config, comm, mesh.pp if mesh.pp.size > 1 else None, mesh.machines)
    if not loaded.rows.validation:
        raise ConfigError("--eval-only needs rows to evaluate on; set data.validation or data.val_fraction (0.1, say)")
    state = TrainState(loaded.model, {}, num_stages=mesh.pp.size)  # Without moments, which nobody asks for.
    checkpoint = None
    if comm.rank == 0 and job.resume is not None:
        checkpoint = load_state(state, make_checkpointer(config), job.resume, loaded.facts)
    if mesh.pp.size > 1:
        stage_files.hand_out(state, checkpoint, comm)
    synchronise(state, mesh.dp)
    trackers = Trackers([ConsoleTracker(loaded.plan.num_steps)] if comm.rank == 0 else [])
    with trackers:
        evaluate = make_evaluate(config, loaded, comm, mesh, trackers, None)
        evaluate(state)
        if comm.rank == 0:
            scored = evaluate.scored
            found = {
                "step": state.step,
                "checkpoint": None if checkpoint is None else str(checkpoint.folder),
                **without_gaps(state.metrics),
                "signatures": {} if scored is None else scored.signatures,
                "samples": [] if scored is None else scored.records,
            }
            for line in sample_lines(evaluate.samples[: config.eval.num_samples]):
                trackers.message(line)
            trackers.message(f"written to {_write(config.output_dir, found)}")
    return 0


def _write(folder: Path, found: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, aside = folder / EVALUATION, folder / f".{EVALUATION}"
    aside.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return aside.replace(path)
