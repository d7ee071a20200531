"""What a run says: the metrics of a step, and the lines at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_distributed.cli.load import Loaded
from mlx_distributed.config import Config, to_dict
from mlx_distributed.errors import printable
from mlx_distributed.train.best import EVAL_LOSS
from mlx_distributed.train.evaluation import Sample
from mlx_distributed.train.step_info import StepInfo

LINE_CHARS = 200
"""A prompt or an answer that is longer is cut where it is shown."""

_COMPARED = {
    EVAL_LOSS: ("held-out loss", "{:.3f}"),
    "eval/exact_match": ("held-out exact match", "{:.0%}"),
    "eval/bleu": ("held-out BLEU", "{:.1f}"),
    "eval/chrf": ("held-out chrF", "{:.1f}"),
    "eval/rouge1": ("held-out ROUGE-1", "{:.3f}"),
    "eval/rouge2": ("held-out ROUGE-2", "{:.3f}"),
    "eval/rougeL": ("held-out ROUGE-L", "{:.3f}"),
}


def step_metrics(info: StepInfo) -> dict[str, float]:
    """A line of metrics.jsonl."""
    return {
        "train/loss": info.loss,
        "train/num_tokens": info.num_tokens,
        "train/learning_rate": info.learning_rate,
        "train/grad_norm": info.grad_norm,
        "perf/tokens_per_s": info.num_tokens / info.step_s,
        "perf/step_s": info.step_s,
        "perf/data_s": info.data_s,
        "perf/comm_s": info.comm_s,
        "perf/comm_exposed_s": info.comm_exposed_s,
        "perf/sent_bytes": info.sent_bytes,
        "perf/peak_memory_bytes": mx.get_peak_memory(),
    }


def describe_data(config: Config, loaded: Loaded) -> dict[str, Any]:
    """What a run is trained on and measured with, in plain values: sources, digests and counts, no text of a row."""
    section = to_dict(config)["data"]
    spans = [] if config.data.streaming else loaded.rows.weights
    return {
        "train": section["train"],
        "validation": section["validation"],
        "val_fraction": section["val_fraction"],
        "train_rows": [stop - start for start, stop, _ in spans],
        "train_sha256": loaded.facts["data"],
        "validation_sha256": loaded.rows.validation_digest,
        "report": asdict(replace(loaded.rows.report, examples=())),
    }


def comparison(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    """One line per figure: before -> after."""
    for key, (name, pattern) in _COMPARED.items():
        if key in after:
            was = f"{pattern.format(before[key])} -> " if key in before else ""
            yield f"{name}: {was}{pattern.format(after[key])}"


def sample_lines(samples: Sequence[Sample]) -> Iterator[str]:
    """Generated answers beside those in the data, a line each."""
    for sample in samples:
        verdict = "as in the data" if sample.exact else f"in the data: {_one_line(sample.reference)}"
        yield f"  {_one_line(sample.prompt)} -> {_one_line(sample.generated)} ({verdict})"


def next_steps(config: Config, final: Path, prompt: str) -> Iterator[str]:
    """What to run now."""
    model = ["--model", str(final)]
    if config.method != "full":
        model = ["--model", str(config.model.path), "--adapter-path", str(final)]
    if config.method != "full" and config.data.chat_template is not None:
        yield "note: an adapter folder holds no chat template; give yours to whatever loads the model"
    yield f"the model is in {final}; try it:"
    yield "  " + shlex.join(["uv", "run", "mlx_lm.generate", *model, "--prompt", prompt])


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= LINE_CHARS else line[: LINE_CHARS - 3] + "..."
