"""The rules of evaluation, early stopping and the best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_distributed.config.problem import Problem
from mlx_distributed.config.schema import Config, EvalConfig


def check_eval(config: Config) -> Iterator[Problem]:
    """Those that `config` breaks."""
    settings, kept = config.eval, config.checkpoint
    validation = ("data.validation", "data.val_fraction")
    has_rows = bool(config.data.validation or config.data.val_fraction)
    if settings.generate and not has_rows:
        rule = "needs rows to generate for; set data.validation or data.val_fraction (0.1, say), or leave it out"
        yield Problem("eval.generate", rule, validation)
    if not settings.metrics:
        yield Problem("eval.metrics", "names no metric; leave it out for exact_match, or set eval.generate to false")
    elif settings.metrics != EvalConfig().metrics and not settings.generate:
        rule = "compares generated answers, and none are generated; set eval.generate=true, or leave this out"
        yield Problem("eval.metrics", rule, ("eval.generate",))
    metric = kept.metric_for_best.removeprefix("eval/")
    if metric not in ("loss", "perplexity") and not (settings.generate and metric in settings.metrics):
        rule = f"is not measured; set eval.generate=true and name {metric} in eval.metrics, or use eval/loss"
        yield Problem("checkpoint.metric_for_best", rule, ("eval.generate", "eval.metrics"))
    if settings.patience is not None:
        if settings.steps is None:
            rule = "counts evaluations, and without eval.steps there is one at the end; set that, or leave this out"
            yield Problem("eval.patience", rule, ("eval.steps",))
        elif not has_rows:
            rule = "needs rows to evaluate on; set data.validation or data.val_fraction (0.1, say), or leave it out"
            yield Problem("eval.patience", rule, validation)
    elif settings.min_delta:
        yield Problem("eval.min_delta", "only means something with eval.patience; set that, or leave this out")
    if kept.final == "best":
        if not kept.keep_best:
            rule = "needs checkpoint.keep_best, or the best may be gone; use true there, or last"
            yield Problem("checkpoint.final", rule, ("checkpoint.keep_best",))
        elif not has_rows:
            rule = "needs rows to evaluate on; set data.validation or data.val_fraction (0.1, say), or use last"
            yield Problem("checkpoint.final", rule, validation)
        elif config.elastic.listen is not None:
            rule = "cannot stand beside elastic.listen: the best checkpoint may be on another machine; use last"
            yield Problem("checkpoint.final", rule, ("elastic.listen",))
