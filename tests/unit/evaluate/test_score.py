"""Scores against sacrebleu and rouge-score on the whole, to the last digit, whatever the texts."""

from __future__ import annotations

import math
from statistics import fmean
from typing import get_args

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from mlx_distributed.config.schema import AnswerMetric, BleuTokenize
from mlx_distributed.evaluate import score as module
from mlx_distributed.evaluate.rouge import rouge_l, rouge_n, words
from mlx_distributed.evaluate.score import score

METRICS: tuple[AnswerMetric, ...] = get_args(AnswerMetric)
ROUGE = ("rouge1", "rouge2", "rougeL")
SCORER = RougeScorer(ROUGE, use_stemmer=False)

# Few words, so that texts share some, beside whatever else there is; empty texts too.
WORDS = st.sampled_from(
    ["the", "cat", "Cat", "sat.", "sat", "1,000", "(on)", "\u4f60\u597d", "\u00e9t\u00e9", "I\u0307", " "]
)
TEXTS = st.one_of(st.lists(WORDS, max_size=12).map(" ".join), st.text(max_size=12))
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_RESAMPLES", 20)


@given(PAIRS, st.sampled_from(get_args(BleuTokenize)))
@settings(max_examples=60, deadline=None)
def test_bleu_and_chrf_are_those_of_sacrebleu(pairs: list[tuple[str, str]], tokenize: BleuTokenize) -> None:
    generated, references = map(list, zip(*pairs, strict=True))
    bleu = sacrebleu.metrics.BLEU(tokenize=tokenize)
    for metric, theirs in (("bleu", bleu), ("chrf", sacrebleu.metrics.CHRF())):
        found = score(metric, generated, references, tokenize)  # type: ignore[arg-type]
        assert found.value == theirs.corpus_score(generated, [references]).score
        assert found.signature == str(theirs.get_signature())
    alone = sacrebleu.metrics.BLEU(tokenize=tokenize, effective_order=True)
    expected = [alone.sentence_score(one, [other]).score for one, other in pairs]
    assert score("bleu", generated, references, tokenize).each == expected


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_rouge_is_that_of_rouge_score(pairs: list[tuple[str, str]]) -> None:
    generated, references = map(list, zip(*pairs, strict=True))
    theirs = [SCORER.score(reference, one) for one, reference in pairs]
    for metric in ROUGE:
        each = [float(found[metric].fmeasure) for found in theirs]
        found = score(metric, generated, references)  # type: ignore[arg-type]
        assert (found.value, found.each) == (fmean(each), each)


@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), max_size=40))
def test_long_texts_too(one: list[str], other: list[str]) -> None:
    found = SCORER.score(" ".join(other), " ".join(one))
    assert rouge_l(one, other) == found["rougeL"].fmeasure
    assert rouge_n(one, other, 2) == found["rouge2"].fmeasure


def test_rouge_can_know_all_letters() -> None:
    assert words("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440_1!", "unicode") == [
        "\u043f\u0440\u0438\u0432\u0435\u0442",
        "\u043c\u0438\u0440",
        "1",
    ]
    assert words("\u4f60\u597d world\u4e16", "unicode") == ["\u4f60", "\u597d", "world", "\u4e16"]
    assert words("\u4f60\u597d W0rld", "ascii") == ["w0rld"]
    same = (["\u4f60\u597d"], ["\u4f60\u597d"])
    assert score("rouge1", *same).value == 0.0
    assert score("rouge1", *same, rouge_tokenize="unicode").value == 1.0
    assert "tok:unicode" in score("rouge1", *same, rouge_tokenize="unicode").signature


def test_exact_match_is_the_share_of_equal_texts() -> None:
    found = score("exact_match", [" nine\n", "Nine", ""], ["nine", "nine", ""])
    assert (found.value, found.each, found.signature) == (2 / 3, [1.0, 0.0, 1.0], "")


@given(PAIRS, st.sampled_from(METRICS), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_answers_does_not_matter(pairs: list[tuple[str, str]], metric: AnswerMetric, random) -> None:  # type: ignore[no-untyped-def]
    mixed = random.sample(pairs, len(pairs))
    found = [score(metric, *map(list, zip(*each, strict=True))) for each in (pairs, mixed)]  # type: ignore[arg-type]
    assert found[0].value == found[1].value


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_lies_about_the_figure_and_is_the_same_each_time(
    metric: AnswerMetric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_RESAMPLES", 1000)
    random = np.random.default_rng(1)
    vocabulary = np.array(["the", "cat", "sat", "on", "a", "mat"])
    references = [" ".join(random.choice(vocabulary, 8)) for _ in range(60)]
    generated = [text if random.random() < 0.4 else text[5:] + " on" for text in references]
    found = score(metric, generated, references)
    assert found == score(metric, generated, references)
    assert found.low < found.value < found.high
    fewer = score(metric, generated[:15], references[:15])
    assert fewer.high - fewer.low > found.high - found.low


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    generated = ["x"] * 300 + ["y"] * 700
    found = module.score("exact_match", generated, ["x"] * 1000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.012)


def test_a_single_answer_has_no_width() -> None:
    found = score("bleu", ["one two three four five"], ["one two three four six"])
    assert found.low == found.value == found.high
