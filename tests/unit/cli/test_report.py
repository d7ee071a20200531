from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mlx_distributed.cli.report import LINE_CHARS, comparison, next_steps, sample_lines, step_metrics
from mlx_distributed.config import Config, DataConfig, ModelConfig
from mlx_distributed.train.evaluation import Sample
from mlx_distributed.train.step_info import StepInfo

FINAL = Path("/runs/a run/final")
PROMPT = 'What\'s "1 + 1"?\nSay $it.'


def test_a_line_of_metrics() -> None:
    times = {"step_s": 0.5, "comm_s": 0.2, "comm_exposed_s": 0.1}
    info = StepInfo(12, 1.5, 300, 2e-4, 0.75, **times, sent_bytes=7, stop_requested=False, data_s=0.01)
    metrics = step_metrics(info)
    assert metrics.pop("perf/peak_memory_bytes") >= 0
    assert metrics == {
        "train/loss": 1.5,
        "train/num_tokens": 300,
        "train/learning_rate": 2e-4,
        "train/grad_norm": 0.75,
        "perf/tokens_per_s": 600.0,
        "perf/step_s": 0.5,
        "perf/data_s": 0.01,
        "perf/comm_s": 0.2,
        "perf/comm_exposed_s": 0.1,
        "perf/sent_bytes": 7,
    }


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({}, {"eval/loss": 0.1234}, ["held-out loss: 0.123"]),
        (
            {"eval/loss": 6.5, "eval/perplexity": 665.0, "eval/exact_match": 0.0},
            {"eval/loss": 0.03, "eval/perplexity": 1.03, "eval/exact_match": 0.954},
            ["held-out loss: 6.500 -> 0.030", "held-out exact match: 0% -> 95%"],
        ),
        ({"eval/exact_match": 0.5}, {"eval/loss": 1.0}, ["held-out loss: 1.000"]),
    ],
)
def test_before_and_after(before: dict[str, float], after: dict[str, float], expected: list[str]) -> None:
    assert list(comparison(before, after)) == expected


def test_samples_take_a_line_each() -> None:
    samples = [
        Sample("Write 9\nin words.", " nine\n", "nine"),
        Sample("Write 8.", "IX", "VIII"),
        Sample("Write 7.", "\x1b]0;mine\x07VII", "\u202eIIV"),
        Sample("w" * (LINE_CHARS + 1), "x" * LINE_CHARS, "y" * 1000),
    ]
    assert list(sample_lines(samples)) == [
        "  Write 9 in words. -> nine (as in the data)",
        "  Write 8. -> IX (in the data: VIII)",
        "  Write 7. -> ?]0;mine?VII (in the data: ?IIV)",
        f"  {'w' * (LINE_CHARS - 3)}... -> {'x' * LINE_CHARS} (in the data: {'y' * (LINE_CHARS - 3)}...)",
    ]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", ["--model", str(FINAL)]),
        ("lora", ["--model", "org/base model", "--adapter-path", str(FINAL)]),
        ("dora", ["--model", "org/base model", "--adapter-path", str(FINAL)]),
    ],
)
def test_what_to_run_next_survives_the_shell(method: str, expected: list[str]) -> None:
    lines = list(next_steps(Config(ModelConfig(path="org/base model"), method=method), FINAL, PROMPT))
    assert lines[:-1] == [f"the model is in {FINAL}; try it:"]
    assert shlex.split(lines[-1]) == ["uv", "run", "mlx_lm.generate", *expected, "--prompt", PROMPT]


@pytest.mark.parametrize(("method", "noted"), [("lora", True), ("full", False)])
def test_an_adapter_cannot_hold_a_chat_template(method: str, noted: bool) -> None:
    config = Config(ModelConfig(path="base"), method=method, data=DataConfig(chat_template="{{ messages }}"))
    lines = list(next_steps(config, FINAL, PROMPT))
    assert lines[0].startswith("note: an adapter folder holds no chat template") == noted
