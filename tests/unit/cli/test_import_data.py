"""Data sets of each program: their lists, registries, formats and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_samples import config, fate, of

from mlx_distributed.cli.import_config.tools import TOOLS
from mlx_distributed.cli.import_config.translate import translate
from mlx_distributed.errors import ConfigError


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("entry", "source", "style"),
    [
        ({"type": "alpaca"}, {"format": "alpaca"}, "classic"),
        (
            {"type": "gpteacher", "split": "train[:5%]", "name": "en"},
            {"format": "alpaca", "columns": {"output": "response"}, "split": "train[:5%]", "subset": "en"},
            "classic",
        ),
        (
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
                "roles": {"user": ["human"], "assistant": ["gpt", "model"]},
            },
            {
                "format": "messages",
                "columns": {"messages": "conversations", "role": "from", "content": "value"},
                "roles": {"human": "user", "gpt": "assistant", "model": "assistant"},
            },
            "chat",
        ),
        ({"type": "completion", "field": "story"}, {"format": "text", "columns": {"text": "story"}}, "chat"),
        ({"type": "sharegpt"}, {"format": "messages", "columns": {"messages": "conversations"}}, "chat"),
        ({"type": {"field_instruction": "q"}}, {"columns": {"instruction": "q"}}, "chat"),
        ({"type": "metharme"}, {"format": "auto"}, "chat"),
    ],
)
def test_data_set_of_axolotl(entry: dict[str, Any], source: dict[str, Any], style: str) -> None:
    found = config(of("axolotl", datasets=[{"path": "org/first", "type": "completion"}, {"path": "org/rows", **entry}]))
    assert found.data.alpaca_style == style
    assert {key: getattr(found.data.train[1], key) for key in source} == source


@pytest.mark.parametrize(
    ("entry", "key", "kind"),
    [
        ({"type": "metharme"}, "type", "no counterpart"),
        ({"type": "alpaca:chat"}, "type", "no counterpart"),
        ({"roles": {"judge": ["x"]}}, "roles.judge", "no counterpart"),
        ({"roles_to_train": ["assistant"]}, "roles_to_train", "mapped"),
        ({"roles_to_train": ["assistant", "human"]}, "roles_to_train", "mapped"),
        ({"roles_to_train": ["tool"]}, "roles_to_train", "no counterpart"),
        ({"field_chosen": "chosen"}, "field_chosen", "refused"),
        ({"data_files": ["a.jsonl", "b.jsonl"]}, "data_files", "no counterpart"),
        ({"colour": "red"}, "colour", "no counterpart"),
    ],
)
def test_fate_within_a_data_set_of_axolotl(entry: dict[str, Any], key: str, kind: str) -> None:
    assert fate(of("axolotl", datasets=[{"path": "org/rows", **entry}]), f"datasets.0.{key}")[0] == kind


def test_local_files_are_found_from_the_current_folder_and_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "more.jsonl").write_text("{}")
    entries = [{"path": "json", "data_files": "rows.jsonl"}, {"path": "more.jsonl"}, {"path": "x" * 5000}]
    root = yaml.compose(yaml.safe_dump({"base_model": "org/model", "datasets": entries, "output_dir": "./out"}))
    assert isinstance(root, yaml.MappingNode)
    found = translate(root, TOOLS["axolotl"], 1, tmp_path / "theirs", tmp_path / "ours").values
    assert found["data.train.0.path"] == str(tmp_path / "rows.jsonl")
    assert found["data.train.1.path"] == str(tmp_path / "theirs" / "more.jsonl")
    assert found["data.train.2.path"] == "x" * 5000
    assert found["output_dir"] == str(tmp_path / "out")


def registry(folder: Path, entries: Any) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "rows.json").write_text("[]")
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "data" / "dataset_info.json").write_text(text)


ENTRIES = {
    "plain": {"file_name": "rows.json"},
    "renamed": {"hf_hub_url": "org/r", "split": "dev", "subset": "en", "columns": {"prompt": "q", "response": "a"}},
    "chat": {
        "hf_hub_url": "org/chat",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "sys"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "me", "assistant_tag": "you"},
    },
    "sampled": {"hf_hub_url": "org/s", "num_samples": 5},
    "pairs": {"hf_hub_url": "org/p", "ranking": True, "columns": {"chosen": "c"}},
}


def test_names_of_a_registry(tmp_path: Path) -> None:
    registry(tmp_path, ENTRIES)
    translation = of("llamafactory", dataset="plain, renamed,chat")
    assert fate(translation, "dataset") == ("mapped", "by dataset_info.json")
    plain, renamed, chat = config(translation).data.train
    assert (plain.path, plain.format) == (str(tmp_path / "data" / "rows.json"), "alpaca")
    assert (renamed.path, renamed.split, renamed.subset) == ("org/r", "dev", "en")
    assert renamed.columns == {"instruction": "q", "output": "a"}
    assert chat.format == "sharegpt"
    assert chat.columns == {"conversations": "turns", "system": "sys", "role": "role", "content": "content"}
    assert chat.roles == {"me": "user", "you": "assistant"}


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        ("sampled", "no counterpart", "sampled.num_samples"),
        ("plain,nowhere", "no counterpart", "nowhere is not in dataset_info.json"),
        ("plain,pairs", "refused", "pairs.ranking, pairs.columns.chosen"),
    ],
)
def test_what_a_registry_says_besides(tmp_path: Path, names: str, kind: str, words: str) -> None:
    registry(tmp_path, ENTRIES)
    found = fate(of("llamafactory", dataset=names), "dataset")
    assert found[0] == kind
    assert words in found[1]


def test_without_a_registry_names_stay(tmp_path: Path) -> None:
    translation = of("llamafactory", dataset="a,b", eval_dataset="c")
    assert fate(translation, "dataset")[0] == "no counterpart"
    assert [source.path for source in config(translation).data.train] == ["a", "b"]
    assert config(translation).data.validation[0].path == "c"


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_registry_that_is_none(tmp_path: Path, text: str) -> None:
    registry(tmp_path, text)
    with pytest.raises(ConfigError, match=r"dataset_info\.json"):
        of("llamafactory", dataset="a")


def test_a_registry_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(tmp_path, "[" + " " * 10_000_000)
    with pytest.raises(ConfigError, match="10000000 bytes"):
        of("llamafactory", dataset="a")


def test_list_of_data_sets_of_v1(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    entries = {"one": {"path": "rows.json", "converter": "alpaca"}, "two": {"path": "org/b", "split": "dev", "size": 5}}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(entries))
    translation = of("llamafactory-v1", train_dataset="list.yaml")
    assert fate(translation, "train_dataset") == ("no counterpart", "in list.yaml: two.size")
    one, two = config(translation).data.train
    assert (one.path, one.format) == (str(tmp_path / "rows.json"), "alpaca")
    assert (two.path, two.split) == ("org/b", "dev")
    (tmp_path / "list.yaml").write_text("pairs: {path: org/p, converter: pair}")
    assert fate(of("llamafactory-v1", train_dataset="list.yaml"), "train_dataset")[0] == "refused"
    (tmp_path / "list.yaml").write_text("one: org/a")
    assert fate(of("llamafactory-v1", train_dataset="list.yaml"), "train_dataset") == ("mapped", "by list.yaml")


def test_folder_of_mlx_lm(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    assert config(of("mlx-lm", data="data")).data.validation == ()
    (tmp_path / "data" / "valid.jsonl").write_text("{}")
    found = config(of("mlx-lm", data="data")).data
    assert found.train[0].path == str(tmp_path / "data" / "train.jsonl")
    assert found.validation[0].path == str(tmp_path / "data" / "valid.jsonl")
