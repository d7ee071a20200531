"""Familiar spellings within the right section."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest

from mlx_distributed.config import Config, load_config, to_dict
from mlx_distributed.config.names import ALIASES, OURS_BY_ALIAS, SPELLINGS
from mlx_distributed.errors import ConfigError

VALUES = {"lora.target_modules": "[q_proj]", "lora.dropout": "0.25", "train.micro_batch_size": "2"}


def load(folder: Path, more: str, overrides: tuple[str, ...] = ()) -> Config:
    path = folder / "run.yaml"
    path.write_text(f"model: {{path: org/model}}\ndata: {{train: org/rows}}\n{more}", encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize("alias", OURS_BY_ALIAS)
def test_alias_is_ours(tmp_path: Path, alias: str) -> None:
    ours = OURS_BY_ALIAS[alias]
    section, _, name = ours.partition(".")
    value = VALUES.get(ours, "4")
    by_override = load(tmp_path, "", (f"{ours}={value}",))
    assert to_dict(load(tmp_path, "", (f"{section}.{alias}={value}",))) == to_dict(by_override)
    if section != "data":
        assert to_dict(load(tmp_path, f"{section}: {{{alias}: {value}}}")) == to_dict(by_override)
    assert reduce(getattr, [section, name], by_override) != reduce(getattr, [section, name], Config())


def test_override_replaces_what_the_file_says_under_another_name(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {num_train_epochs: 3}", ("train.epochs=4",)).train.epochs == 4
    assert load(tmp_path, "train: {epochs: 3}", ("train.num_epochs=4",)).train.epochs == 4


def test_both_spellings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:5: lora.rank=16: the key stands on line 4 too; keep one of them"):
        load(tmp_path, "lora:\n  rank: 8\n  lora_r: 16\n")


@pytest.mark.parametrize("text", ["lora_r: 8", "train: {lora_r: 8}", "optimizer: {r: 8}"])
def test_elsewhere_it_is_unknown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key; write lora\.rank"):
        load(tmp_path, text)


def test_a_spelling_is_an_alias_or_a_hint() -> None:
    hints = [name for names in SPELLINGS.values() for name in names.split()]
    aliases = [name for names in ALIASES.values() for name in names.split()]
    assert len({*hints, *aliases}) == len(hints) + len(aliases)
