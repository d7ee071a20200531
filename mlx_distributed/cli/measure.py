"""What a run measures on its validation rows, put together from its configuration."""

from __future__ import annotations

import mlx.nn as nn

from mlx_distributed.cli.load import Loaded
from mlx_distributed.comm.base import Communicator
from mlx_distributed.config import Config
from mlx_distributed.data.batch import by_length
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.tracking import Trackers
from mlx_distributed.train.best import stops_early
from mlx_distributed.train.evaluation import Sample, evaluate_generation, score_samples
from mlx_distributed.train.hooks import Answering, Evaluate, Save
from mlx_distributed.train.state import TrainState


def make_evaluate(
    config: Config, loaded: Loaded, comm: Communicator, mesh: Mesh, trackers: Trackers, save_best: Save | None
) -> Evaluate:
    """The evaluation that `config` asks for.

    Args:
        config: of the run.
        loaded: data and model.
        comm: of all ranks.
        mesh: its axes.
        trackers: of this rank.
        save_best: called where the state is the best so far; None where that does not matter.
    """
    settings, rows = config.eval, loaded.rows.validation
    pipeline = loaded.staged.pipeline if loaded.staged else None

    def generate(model: nn.Module) -> list[Sample]:
        asked = rows[: settings.max_examples]
        return evaluate_generation(model, loaded.tokenizer, asked, settings.max_new_tokens, mesh.dp, pipeline)

    return Evaluate(
        by_length(rows, config.train.micro_batch_size, config.train.micro_batch_tokens),
        mesh.dp,
        trackers,
        save_best,
        pipeline,
        Answering(generate, lambda samples: score_samples(samples, settings)) if settings.generate else None,
        comm,
        config.checkpoint.metric_for_best,
    )


def pays_no_more(config: Config, state: TrainState) -> bool:
    """Whether the evaluations so far end the run early; the same on every rank that knows of them."""
    settings, metric = config.eval, config.checkpoint.metric_for_best
    return stops_early(metric, state.evaluations, settings.patience, settings.min_delta)
