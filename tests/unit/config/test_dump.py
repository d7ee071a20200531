"""What is written can be read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.config import Config, load_config, to_dict, to_yaml


def load(folder: Path, text: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    return load_config(path)


MINIMAL = "model: {path: org/model}\ndata: {train: org/rows}\n"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1) | st.sampled_from(
    ["1e-5", "no", "null", "~", "1", "007", "1:30", ".nan", "<<", "true", "2024-01-01", "- a", "a: b", "#"]
)
SHARES = st.floats(0.01, 0.99) | st.floats(1e-30, 1e-5)


@given(
    rate=st.floats(1e-300, 1e300),
    betas=st.tuples(SHARES, SHARES),
    steps=st.none() | st.integers(1, 10**12),
    seed=st.integers(0, 2**32 - 1),
    name=st.none() | TEXT,
    tags=st.lists(TEXT).map(tuple),
    columns=st.dictionaries(TEXT, TEXT),
    modules=st.just("all-linear") | st.lists(TEXT, min_size=1).map(tuple),
    scratch=st.dictionaries(TEXT, st.integers() | SHARES | st.booleans() | TEXT | st.lists(TEXT)),
    flag=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_yaml_loads_back_to_an_equal_config(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    folder = tmp_path_factory.mktemp("yaml")
    base = load(folder, MINIMAL)
    scratch = drawn["scratch"] | {"model_type": "qwen3", "vocab_size": 512}
    source = replace(base.data.train[0], columns=drawn["columns"])
    config = replace(
        base,
        model=replace(base.model, path=None, scratch=scratch),
        method="full",
        lora=replace(base.lora, target_modules=drawn["modules"]),
        data=replace(base.data, train=(source, source), train_on_eos=drawn["flag"]),
        train=replace(base.train, max_steps=drawn["steps"], max_grad_norm=None),
        optimizer=replace(base.optimizer, learning_rate=drawn["rate"], betas=drawn["betas"]),
        wandb=replace(base.wandb, name=drawn["name"], tags=drawn["tags"]),
        seed=drawn["seed"],
    )
    assert load(folder, to_yaml(config)) == config


def test_dict_is_plain_and_in_the_order_of_the_schema(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    plain = to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain)[:4] == ["model", "method", "lora", "data"]
    assert to_yaml(config).startswith("model:\n  path: org/model\n  revision: null\n")
