from __future__ import annotations

import math
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import sacrebleu
from train_samples import make_rows, make_state, on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.config import ModelConfig
from mlx_distributed.config.schema import AnswerMetric, EvalConfig
from mlx_distributed.data.batch import by_length
from mlx_distributed.data.tokenize import Row
from mlx_distributed.evaluate.generate import generate
from mlx_distributed.models import load
from mlx_distributed.models.upstream import TokenizerWrapper
from mlx_distributed.testing import tiny_model
from mlx_distributed.tracking import Trackers
from mlx_distributed.train.evaluation import GENERATE_BATCH, Sample, evaluate_generation, evaluate_loss, score_samples
from mlx_distributed.train.hooks import Answering, Evaluate
from mlx_distributed.train.state import TrainState

SIZES = [1, 2, 3]
MAX_NEW_TOKENS = 6


def plain_loss(model: nn.Module, rows: list[Row]) -> float:
    """Row by row, added in float64."""
    losses, num_tokens = [], 0
    model.eval()
    for row in rows:
        logits = model(mx.array(row.tokens[None, :-1]))
        each = nn.losses.cross_entropy(logits, mx.array(row.tokens[None, 1:]))
        losses.append(float(np.asarray(each, np.float64)[0][row.loss_mask[1:]].sum()))
        num_tokens += int(row.loss_mask.sum())
    model.train()
    return math.fsum(losses) / num_tokens


@pytest.mark.parametrize("num_rows", [1, 2, 40])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_loss_has_the_same_bits_on_any_number_of_ranks(num_rows: int, micro_batch_size: int) -> None:
    rows = make_rows(num_rows, seed=1)
    models = [make_state(dropout=0.5).model for _ in range(max(SIZES))]
    found = []
    for size in SIZES:
        found += on_ranks(size, lambda comm: evaluate_loss(models[comm.rank], by_length(rows, micro_batch_size), comm))
    assert found == [found[0]] * sum(SIZES)
    assert found[0]["eval/loss"] == pytest.approx(plain_loss(make_state().model, rows), rel=1e-6)
    assert found[0]["eval/perplexity"] == math.exp(found[0]["eval/loss"])


def test_dropout_is_off_meanwhile_and_no_randomness_is_used() -> None:
    model, rows = make_state(dropout=0.5).model, make_rows(9)
    mx.random.seed(1)
    expected = mx.random.uniform().item()
    mx.random.seed(1)
    batches = by_length(rows, 2)
    assert evaluate_loss(model, batches, LocalComm()) == evaluate_loss(model, batches, LocalComm())
    assert mx.random.uniform().item() == expected
    assert model.training
    assert model.dropout.training


def test_a_model_that_fails_in_the_middle_goes_back_to_training() -> None:
    model = make_state().model
    model.head.weight = mx.zeros((3, 5))
    with pytest.raises(ValueError):
        evaluate_loss(model, by_length(make_rows(1), 2), LocalComm())
    assert model.training


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity() -> None:
    model = make_state().model
    model.head.weight = model.head.weight * 1e5
    metrics = evaluate_loss(model, by_length(make_rows(9), 2), LocalComm())
    assert metrics["eval/loss"] > 700
    assert metrics["eval/perplexity"] == math.inf


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[nn.Module, TokenizerWrapper]]:
    """The same model once for every rank."""
    folder = tiny_model(tmp_path_factory.mktemp("evaluation") / "model", tied=False)
    return [load(ModelConfig(path=str(folder)))[:2] for _ in range(max(SIZES))]


def prompts_of(num_rows: int, num_lengths: int) -> list[Row]:
    """Prompts of several lengths, each followed by a reference of two tokens and a stop token."""
    random = np.random.default_rng(num_rows)
    rows = []
    for i in range(num_rows):
        length = 4 + i % num_lengths
        tokens = random.integers(5, 290, length + 3).astype(np.int32)
        rows.append(Row(tokens, np.arange(length + 3) >= length, (length, length + 2)))
    return rows


@pytest.mark.parametrize(("num_rows", "num_lengths"), [(1, 1), (7, 3), (2 * GENERATE_BATCH + 1, 1)])
def test_answers_are_the_same_on_any_number_of_ranks(
    loaded: list[tuple[nn.Module, TokenizerWrapper]], num_rows: int, num_lengths: int
) -> None:
    rows = prompts_of(num_rows, num_lengths)
    model, tokenizer = loaded[0]
    answers = [
        generate(model, [row.tokens[: row.reference[0]].tolist()], MAX_NEW_TOKENS, tokenizer.eos_token_ids)[0]
        for row in rows
    ]
    expected = [
        Sample(
            tokenizer.decode(row.tokens[: row.reference[0]].tolist()),
            tokenizer.decode(answer),
            tokenizer.decode(row.tokens[slice(*row.reference)].tolist()),
        )
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert len({sample.generated for sample in expected}) > num_rows // 2
    for size in SIZES:
        found = on_ranks(size, lambda comm: evaluate_generation(*loaded[comm.rank], rows, MAX_NEW_TOKENS, comm))
        assert found == [expected] * size


def test_an_answer_is_exact_but_for_white_space_around_it() -> None:
    assert Sample("p", " DCC XC\n", "DCC XC").exact
    assert not Sample("p", "DCC  XC", "DCC XC").exact
    assert not Sample("p", "", "DCC").exact


@pytest.mark.parametrize("num_rows", [1, 7])
def test_scores_have_the_same_bits_on_any_number_of_ranks(
    loaded: list[tuple[nn.Module, TokenizerWrapper]], num_rows: int
) -> None:
    rows = prompts_of(num_rows, 3)
    settings = EvalConfig(generate=True, metrics=get_args(AnswerMetric))

    def work(comm: Communicator) -> dict[str, float]:
        model, tokenizer = loaded[comm.rank]
        answering = Answering(
            lambda model: evaluate_generation(model, tokenizer, rows, MAX_NEW_TOKENS, comm),
            lambda samples: score_samples(samples, settings),
        )
        state = TrainState(model, {}, step=3)
        Evaluate(by_length(rows, 2), comm, Trackers([]), None, answering=answering)(state)
        return state.metrics

    found = [metrics for size in SIZES for metrics in on_ranks(size, work)]
    assert found == [found[0]] * sum(SIZES)
    model, tokenizer = loaded[0]
    samples = evaluate_generation(model, tokenizer, rows, MAX_NEW_TOKENS, LocalComm())
    generated, references = [sample.generated for sample in samples], [sample.reference for sample in samples]
    assert found[0]["eval/chrf"] == sacrebleu.corpus_chrf(generated, [references]).score
    assert found[0]["eval/bleu"] == sacrebleu.corpus_bleu(generated, [references]).score
    assert found[0].items() >= evaluate_loss(model, by_length(rows, 2), LocalComm()).items()
    intervals = {f"eval/{name}{end}" for name in settings.metrics for end in ("", "_low", "_high")}
    assert found[0].keys() == {"eval/loss", "eval/perplexity", *intervals}


def test_every_answer_has_figures_of_its_own() -> None:
    samples = [Sample("p", "one two", "one two"), Sample("q", "", "three")]
    scored = score_samples(samples, EvalConfig(metrics=("exact_match", "rougeL", "rougeL")))
    assert scored.records == [
        {"row": 0, "prompt": "p", "generated": "one two", "reference": "one two", "eval/exact_match": 1.0}
        | {"eval/rougeL": 1.0},
        {"row": 1, "prompt": "q", "generated": "", "reference": "three", "eval/exact_match": 0.0, "eval/rougeL": 0.0},
    ]
    assert list(scored.signatures) == ["eval/rougeL"]
