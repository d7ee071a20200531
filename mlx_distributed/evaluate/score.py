"""How generated answers compare with those in the data: a figure, an interval around it, and how it was computed.

A figure is a function of statistics that are added over answers, in their order and exactly. So it is the same on any
number of workers, and a resample of the bootstrap costs one sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_distributed import __version__
from mlx_distributed.config.schema import AnswerMetric, BleuTokenize, RougeTokenize
from mlx_distributed.evaluate.rouge import rouge_l, rouge_n, words

NUM_RESAMPLES = 1000
_SEED = 12345


@dataclass(frozen=True)
class Score:
    """BLEU and chrF go from 0 to 100, as papers give them, and the others from 0 to 1."""

    value: float
    low: float
    high: float
    """Ends of a 95 % interval: percentiles over `NUM_RESAMPLES` sets of answers drawn from these, by a fixed seed."""
    each: list[float]
    """Of every answer alone. For BLEU, of the orders that an answer is long enough for (`effective_order`)."""
    signature: str
    """How it was computed, for others to compare with; of BLEU and chrF that of sacrebleu. Exact match has none."""


@dataclass(frozen=True)
class _Measured:
    statistics: list[list[float]]
    figure: Callable[[list[float]], float]
    """Of the sums of statistics."""
    each: list[float]
    signature: str


def score(
    metric: AnswerMetric,
    generated: Sequence[str],
    references: Sequence[str],
    bleu_tokenize: BleuTokenize = "13a",
    rouge_tokenize: RougeTokenize = "ascii",
) -> Score:
    """Compare answers with references, one each and at least one.

    BLEU (Papineni 2002, Post 2018) and chrF (Popovic 2015) are sacrebleu's of a corpus. ROUGE (Lin 2004) is the mean F1
    of rouge-score without stemming, and `exact_match` the share of texts that are equal but for white space around
    them.
    """
    assert len(generated) == len(references) > 0
    match metric:
        case "bleu" | "chrf":
            measured = _sacrebleu(metric, generated, references, bleu_tokenize)
        case "exact_match":
            each = [float(one.strip() == other.strip()) for one, other in zip(generated, references, strict=True)]
            measured = _mean(each, "")
        case _:
            each = _rouge(metric, generated, references, rouge_tokenize)
            measured = _mean(each, f"nrefs:1|case:lc|tok:{rouge_tokenize}|stem:no|mean:f1|version:{__version__}")
    value = measured.figure([math.fsum(column) for column in zip(*measured.statistics, strict=True)])
    low, high = _interval(measured)
    return Score(value, low, high, measured.each, measured.signature)


def _interval(measured: _Measured) -> tuple[float, float]:
    table, random = np.asarray(measured.statistics, np.float64), np.random.default_rng(_SEED)
    num_rows = len(table)
    figures = []
    for _ in range(NUM_RESAMPLES):
        times_drawn = np.bincount(random.integers(num_rows, size=num_rows), minlength=num_rows)
        figures.append(measured.figure((times_drawn @ table).tolist()))
    low, high = np.percentile(figures, [2.5, 97.5]).tolist()
    return low, high


def _mean(each: list[float], signature: str) -> _Measured:
    statistics = [[value, 1.0] for value in each]
    return _Measured(statistics, lambda sums: sums[0] / sums[1], each, signature)


def _rouge(
    metric: AnswerMetric, generated: Sequence[str], references: Sequence[str], tokenize: RougeTokenize
) -> list[float]:
    pairs = [(words(one, tokenize), words(other, tokenize)) for one, other in zip(generated, references, strict=True)]
    if metric == "rougeL":
        return [rouge_l(*pair) for pair in pairs]
    return [rouge_n(*pair, n=int(metric[-1])) for pair in pairs]


def _sacrebleu(
    metric: AnswerMetric, generated: Sequence[str], references: Sequence[str], tokenize: BleuTokenize
) -> _Measured:
    # Here, not above: the import takes a quarter of a second, and most runs generate nothing.
    from sacrebleu.metrics import BLEU, CHRF

    # `force` only silences a warning about answers that look tokenised.
    whole = BLEU(tokenize=tokenize, force=True) if metric == "bleu" else CHRF()
    alone = BLEU(tokenize=tokenize, force=True, effective_order=True) if metric == "bleu" else whole
    # What every metric of sacrebleu is made of; its public functions give a figure, and the statistics to none but its
    # own bootstrap, which only tells half the width of an interval.
    statistics = whole._extract_corpus_statistics(generated, [references])
    each = [alone._compute_score_from_stats(row).score for row in statistics]
    return _Measured(
        statistics, lambda sums: whole._compute_score_from_stats(sums).score, each, str(whole.get_signature())
    )
