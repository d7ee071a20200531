"""`mlx-distributed score`: how the answers in one file compare with the references in another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from mlx_distributed.cli.verb import Verbs, add_verb
from mlx_distributed.config.checks import listed
from mlx_distributed.config.schema import AnswerMetric, BleuTokenize, RougeTokenize
from mlx_distributed.errors import ConfigError, DataError

METRICS: tuple[AnswerMetric, ...] = get_args(AnswerMetric)

EPILOG = """\
examples:
  mlx-distributed score answers.txt references.txt
  mlx-distributed score answers.txt references.txt --metrics bleu,chrf --bleu-tokenize zh
  mlx-distributed score both.jsonl both.jsonl

A file has one text a line. A .jsonl file has a JSON string a line, or an object as in the samples.jsonl of a run:
predictions are then its `generated`, references its `reference`.

exit status: 0 done; 2 a file was refused
"""


def add_score(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    score = add_verb(
        verbs,
        "score",
        _score,
        summary="compare generated answers with references: BLEU, chrF, ROUGE, exact match",
        description="Print a line per metric: the figure, a 95 % bootstrap interval, and how it was computed.",
        epilog=EPILOG,
    )
    score.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="one text a line, or .jsonl")
    score.add_argument("references", type=Path, metavar="REFERENCES", help="as many lines")
    score.add_argument(
        "--metrics", default=",".join(METRICS), metavar="LIST", help="of %(default)s, with commas; all by default"
    )
    score.add_argument("--bleu-tokenize", choices=get_args(BleuTokenize), default="13a", help="words of BLEU (13a)")
    score.add_argument("--rouge-tokenize", choices=get_args(RougeTokenize), default="ascii", help="of ROUGE (ascii)")


def _score(args: argparse.Namespace) -> int:
    metrics = [_metric(name) for name in args.metrics.split(",")]
    predictions, references = _read(args.predictions, "generated"), _read(args.references, "reference")
    if len(predictions) != len(references):
        raise DataError(
            f"{args.predictions} has {len(predictions)} lines and {args.references} has {len(references)}; every "
            "prediction needs one reference, in the same order"
        )
    if not predictions:
        raise DataError(f"{args.predictions} has no lines; give at least one prediction")
    from mlx_distributed.evaluate.score import score  # numpy need not be there for `--help`

    for metric in metrics:
        found = score(metric, predictions, references, args.bleu_tokenize, args.rouge_tokenize)
        print(f"{metric} {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] {found.signature}".rstrip())
    return 0


def _metric(name: str) -> AnswerMetric:
    for metric in METRICS:
        if name.strip() == metric:
            return metric
    raise ConfigError(f"--metrics: {name!r} is not known here; use {listed(METRICS)}")


def _read(path: Path, name: str) -> list[str]:
    """The texts in a file; `name` is that of a text where lines are objects."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.removesuffix("\n") for line in file]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None
    if path.suffix != ".jsonl":
        return lines
    return [_text(line, f"{path}:{number}", name) for number, line in enumerate(lines, 1)]


def _text(line: str, place: str, name: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); give a file of plain lines another ending than .jsonl") from None
    text = value.get(name) if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{place}: must be a JSON string, or an object with a text as {name!r}")
    return text
