from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_distributed.config import Config, DataConfig, ModelConfig, SourceConfig, load_config
from mlx_distributed.config.checks import check
from mlx_distributed.errors import ConfigError

VALIDATED = {"data__val_fraction": 0.1}
ELASTIC = {"elastic__enabled": True}


def changed(**changes: Any) -> Config:
    """A good configuration with some values changed; `a__b` is `a.b`."""
    config = Config(ModelConfig(path="org/base"), data=DataConfig(train=(SourceConfig(path="org/rows"),)))
    for key, value in changes.items():
        section, name = key.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"eval__metrics": ()}, "eval.metrics", "names no metric"),
        (VALIDATED | {"eval__metrics": ("bleu",)}, "eval.metrics", "none are generated; set eval.generate=true"),
        (
            VALIDATED | {"checkpoint__metric_for_best": "eval/exact_match"},
            "checkpoint.metric_for_best",
            "is not measured; set eval.generate=true and name exact_match in eval.metrics",
        ),
        (
            VALIDATED | {"eval__generate": True, "checkpoint__metric_for_best": "eval/bleu"},
            "checkpoint.metric_for_best",
            "name bleu in eval.metrics",
        ),
        (VALIDATED | {"eval__patience": 0, "eval__steps": 5}, "eval.patience", "at least 1; leave it out"),
        (VALIDATED | {"eval__patience": 2}, "eval.patience", "counts evaluations, and without eval.steps"),
        ({"eval__patience": 2, "eval__steps": 5}, "eval.patience", "needs rows to evaluate on"),
        ({"eval__min_delta": -0.1}, "eval.min_delta", "at least 0; the default is 0.0"),
        ({"eval__min_delta": 0.1}, "eval.min_delta", "only means something with eval.patience"),
        ({"checkpoint__final": "best"}, "checkpoint.final", "needs rows to evaluate on"),
        (
            VALIDATED | {"checkpoint__final": "best", "checkpoint__keep_best": False},
            "checkpoint.final",
            "needs checkpoint.keep_best",
        ),
        (
            VALIDATED | ELASTIC | {"checkpoint__final": "best", "elastic__listen": "10.0.0.7:4000"},
            "checkpoint.final",
            "may be on another machine; use last",
        ),
    ],
)
def test_broken_rule(changes: dict[str, Any], key: str, words: str) -> None:
    [problem] = check(changed(**changes))
    assert problem.key == key
    assert words in problem.message


@pytest.mark.parametrize(
    "changes",
    [
        VALIDATED | {"eval__generate": True, "eval__metrics": ("bleu",), "checkpoint__metric_for_best": "eval/bleu"},
        VALIDATED | {"eval__steps": 5, "eval__patience": 1, "eval__min_delta": 0.5, "checkpoint__final": "best"},
        VALIDATED | ELASTIC | {"checkpoint__final": "best", "checkpoint__metric_for_best": "eval/perplexity"},
    ],
)
def test_kept_rules(changes: dict[str, Any]) -> None:
    assert check(changed(**changes)) == []


def test_metrics_are_a_list_or_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: org/base}\ndata: {train: org/rows, val_fraction: 0.1}\neval: {generate: true}\n")
    for text, metrics in (("rougeL", ("rougeL",)), ("[bleu, chrf]", ("bleu", "chrf"))):
        assert load_config(path, [f"eval.metrics={text}"]).eval.metrics == metrics
    for text in ("rouge", "[bleu, rouge]"):
        with pytest.raises(ConfigError, match="rouge: must be "):
            load_config(path, [f"eval.metrics={text}"])
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["eval.metrics=4"])
    assert "must be a list of any of exact_match, bleu, chrf, rouge1, rouge2, rougeL" in str(caught.value)
