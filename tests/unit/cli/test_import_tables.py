"""The tables of the other programs, as a whole: what they name exists, and no key is lost."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distributed.cli.import_config.render import report, to_text
from mlx_distributed.cli.import_config.rules import Tool, off
from mlx_distributed.cli.import_config.tools import TOOLS, detect
from mlx_distributed.cli.import_config.translate import Translation, leaves, translate
from mlx_distributed.config.load import parse_config
from mlx_distributed.config.schema import Config, SourceConfig
from mlx_distributed.errors import ConfigError

KINDS = {"mapped", "not needed", "no counterpart", "refused"}
VALUES = st.sampled_from(
    [
        None,
        True,
        False,
        "auto",
        "no",
        "x",
        "a,b",
        "a\nb",
        "\x1b[2J",
        0,
        1,
        3,
        0.5,
        -1,
        10**400,
        ["a"],
        [0.9, 0.95],
        [],
        {},
    ]
)


def ours(section: object, prefix: str = "") -> set[str]:
    found = set()
    for field in fields(section):  # type: ignore[arg-type]
        found.add(prefix + field.name)
        child = getattr(section, field.name)
        found |= ours(child, f"{prefix}{field.name}.") if is_dataclass(child) else set()
    return found


def file_with(key: str, value: Any) -> dict[str, Any]:
    """A configuration in which `key` of a table stands."""
    for part in reversed(key.split(".")):
        value = [value] if part == "*" else {part: value}
    assert isinstance(value, dict)
    return value


def of(values: dict[str, Any], tool: Tool, folder: Path, num_devices: int = 1) -> Translation:
    root = yaml.compose(yaml.safe_dump(values))
    assert isinstance(root, yaml.MappingNode)
    return translate(root, tool, num_devices, folder, folder)


@pytest.mark.parametrize("name", TOOLS)
def test_every_target_is_a_key_of_ours(name: str) -> None:
    known = ours(Config()) | {
        f"data.{split}.*.{key}" for split in ("train", "validation") for key in ours(SourceConfig())
    }
    for theirs, rule in TOOLS[name].rules.items():
        targets = {re.sub(r"\.0\.", ".*.", target) for target in rule.targets}
        assert targets <= known, theirs


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("value", [True, 2, "some text", ["one", "two"]], ids=repr)
def test_every_key_of_a_table_has_a_fate(name: str, value: Any, tmp_path: Path) -> None:
    tool = TOOLS[name]
    for key in tool.rules:
        translation = of(file_with(key, value), tool, tmp_path)
        (finding,) = [finding for finding in translation.findings if not finding.default]
        assert finding.key == key.replace("*", "0")
        assert finding.fate.kind in KINDS
        assert finding.fate.kind == "mapped" or finding.fate.words
        assert finding.fate.words != "is not known here"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_key_is_lost_and_what_is_written_is_yaml(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    tool = TOOLS[data.draw(st.sampled_from([*TOOLS]))]
    keys = [*sorted({key.partition(".")[0] for key in tool.rules}), "un\x1bknown\nmodel: x", "0"]
    nested = st.dictionaries(st.sampled_from(["path", "type", "name", "r", "roles", "new\nline"]), VALUES)
    values = data.draw(
        st.dictionaries(st.sampled_from(keys), VALUES | nested | st.lists(nested, max_size=2), min_size=1)
    )
    root = yaml.compose(yaml.safe_dump(values))
    assert isinstance(root, yaml.MappingNode)
    translation = translate(root, tool, 1, folder, folder)
    named = Counter(finding.key for finding in translation.findings if not finding.default)
    assert named == Counter(key for key, _ in leaves(root))
    assert all(finding.fate.kind in KINDS for finding in translation.findings)
    told = report(translation, "a.yml")
    assert all(f"{key.replace(chr(10), '?').replace(chr(27), '?')}: " in told for key in named)
    text = to_text(translation, "a\nb.yml")
    assert all(letter.isprintable() or letter == "\n" for letter in text + told)
    read = yaml.safe_load(text)
    assert {*read} <= {field.name for field in fields(Config)}
    for key, value in translation.values.items():
        section, _, name = key.partition(".")
        if name and "." not in name and not isinstance(value, float):
            assert read[section][name] == value


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("base_model datasets adapter", "axolotl"),
        ("model_name_or_path stage template", "llamafactory"),
        ("model peft_config train_dataset", "llamafactory-v1"),
        ("model data iters", "mlx-lm"),
    ],
)
def test_the_program_is_known_by_its_keys(keys: str, name: str) -> None:
    assert detect(Path("a.yml"), keys.split()).name == name


@pytest.mark.parametrize(
    ("keys", "why"), [("a b", "none of its keys is known"), ("learning_rate", "as much of axolotl as of")]
)
def test_a_file_of_nobody(keys: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{why}.*--from axolotl, llamafactory, llamafactory-v1 or mlx-lm"):
        detect(Path("a.yml"), keys.split())


def test_off_is_not_every_false_value() -> None:
    assert all(map(off, [None, False, 0, 0.0, "", "no", [], {}]))
    assert not any(map(off, [True, 1, "x", [0], {"a": 0}]))


@pytest.mark.parametrize("name", TOOLS)
def test_defaults_make_a_configuration(name: str, tmp_path: Path) -> None:
    model = {"axolotl": "base_model", "llamafactory": "model_name_or_path"}.get(name, "model")
    rows = {"axolotl": {"datasets": [{"path": "org/rows"}]}, "llamafactory": {"dataset": "org/rows"}}
    other = {"llamafactory-v1": {"train_dataset": "org/rows"}, "mlx-lm": {"data": "org/rows"}}
    translation = of({model: "org/model", **(rows | other)[name]}, TOOLS[name], tmp_path)
    config = parse_config(to_text(translation, "a.yml"), tmp_path / "our.yaml")
    assert config.model.path == "org/model"
    assert config.data.train[0].path == "org/rows"
