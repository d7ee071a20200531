"""What in a configuration does not go with the data or the model, though each value by itself is allowed."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_distributed.cli.doctor.case import Case
from mlx_distributed.cli.doctor.finding import Finding, counted
from mlx_distributed.config import Config

ADAPTER_RATES = (1e-5, 1e-3)
FULL_RATES = (1e-6, 1e-4)
SCRATCH_RATES = (1e-4, 1e-2)
"""Usual learning rates of AdamW: of adapters, of a trained model, of a new one."""


def check_settings(case: Case) -> Iterator[Finding]:
    """`ok` where all of it goes together."""
    found = [*_rates(case.config), *_validation(case), *_amounts(case), *_positions(case)]
    yield from found or [Finding("settings", "ok", "nothing that does not go together")]


def _rates(config: Config) -> Iterator[Finding]:
    rate, of = config.optimizer.learning_rate, f"method {config.method}"
    low, high = ADAPTER_RATES
    if config.model.scratch is not None:
        of, (low, high) = "a model from scratch", SCRATCH_RATES
    elif config.method == "full":
        low, high = FULL_RATES
    if not low <= rate <= high:
        text = f"optimizer.learning_rate={rate:g} is unusually {'low' if rate < low else 'high'} for {of}"
        yield Finding("learning rate", "warning", text, f"usual is {low:g} to {high:g}")


def _validation(case: Case) -> Iterator[Finding]:
    evaluation, data = case.config.eval, case.config.data
    if data.validation or data.val_fraction:
        return
    text = "there are no validation rows, so nothing tells whether the model gets better"
    if evaluation.steps is not None:
        text = f"eval.steps={evaluation.steps} evaluates nothing, as there are no validation rows"
    yield Finding("validation", "warning", text, "set data.validation, or data.val_fraction=0.1")


def _amounts(case: Case) -> Iterator[Finding]:
    if case.plan is None:
        return
    num_rows, size = len(case.plan.lengths), case.config.train.global_batch_size
    if num_rows < size:
        text = f"train.global_batch_size={size} is more than the {counted(num_rows)} to train on: an epoch is one step"
        yield Finding("batch size", "warning", text, "a smaller one, or more rows")


def _positions(case: Case) -> Iterator[Finding]:
    limit, positions = case.config.data.max_seq_length, case.architecture.get("max_position_embeddings")
    if not isinstance(positions, int) or limit <= positions:
        return
    lengths = [len(row.tokens) for seen in case.seen if (row := seen.row) is not None]
    longer = sum(length > positions for length in lengths)
    text = f"data.max_seq_length={limit} is more than the {positions} positions of the model, "
    text += f"and rows are longer: {longer}" if longer else "though no row is longer"
    mend = f"data.max_seq_length={positions}"
    yield Finding("positions", "problem" if longer else "warning", text, mend)
