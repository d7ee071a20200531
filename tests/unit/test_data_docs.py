"""Every example and every reason in `docs/data.md` is what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from mlx_distributed.config import DataConfig, SourceConfig, load_config
from mlx_distributed.data import (
    ConcreteFormat,
    Conversation,
    DataReport,
    detect_format,
    normalise,
    read_corpus,
    tokenize_corpus,
)
from mlx_distributed.data.formats import ROLES
from mlx_distributed.models import train_tokenizer, wrap_tokenizer
from mlx_distributed.models.upstream import TokenizerWrapper

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES: dict[ConcreteFormat, Any] = {
    name: json.loads(example)
    for name, example in re.findall(r"^\*\*`(\w+)`\*\*:.*?^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
REASONS = [reason for cell in re.findall(r"\| invalid: (.*?) \|", PAGE) for reason in re.findall(r"`(.*?)`", cell)]

ASK, ANSWER = {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}
CALL = {"from": "function_call", "value": '{"name": "pick", "arguments": {}}'}
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"conversations": list(turns)}


def says(role: str, content: object) -> dict[str, Any]:
    return {"from": role, "value": content}


INVALID: dict[str, tuple[ConcreteFormat, object, dict[str, Any]]] = {
    "empty output": ("alpaca", {"instruction": "Add.", "output": " "}, {}),
    "input is not text": ("alpaca", {"instruction": "Add.", "input": 3, "output": "x"}, {}),
    "unknown role": ("sharegpt", chat(ASK, says("bystander", "Oh.")), {}),
    "no assistant turn after a user turn": ("sharegpt", chat(ANSWER, ASK), {}),
    "neighbouring turns of one role": ("sharegpt", chat(ASK, ASK, ANSWER), {"merge_turns": False}),
    "empty assistant turn": ("sharegpt", chat(ASK, says("gpt", " "), ASK, ANSWER), {}),
    "system text after the first turn": ("sharegpt", chat(ASK, says("system", "Be brief."), ANSWER), {}),
    "function call is not JSON with a name and arguments": (
        "sharegpt",
        chat(ASK, says("function_call", "pick()"), ANSWER),
        {},
    ),
    "assistant text after a function call without its result": ("sharegpt", chat(ASK, CALL, ANSWER), {}),
    "content has a part that is not text": ("messages", {"messages": [says("user", [{"type": "image_url"}])]}, {}),
    "text is not valid Unicode": ("text", {"text": "\ud83d"}, {}),
    "the chat template refuses the conversation": (
        "sharegpt",
        chat(says("system", "Be brief."), ASK, ANSWER),
        {"chat_template": NO_SYSTEM},
    ),
    "the chat template does not show a function call": (
        "sharegpt",
        chat(ASK, CALL, says("observation", "1"), ANSWER),
        {"chat_template": NO_SYSTEM},
    ),
    "line is not valid JSON": ("text", None, {}),
    "row is not an object": ("text", ["a", "list"], {}),
}
"""Reason -> a row that is refused for it (None is a broken line), and the `data` section that it needs."""


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return wrap_tokenizer(train_tokenizer(["a few words"], 300), "qwen3")


def test_there_is_one_example_for_each_format() -> None:
    assert sorted(EXAMPLES) == sorted(get_args(ConcreteFormat))


@pytest.mark.parametrize("format", EXAMPLES)
def test_every_example_is_detected_normalised_and_trainable(
    format: ConcreteFormat, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    source = SourceConfig(path=str(tmp_path / "rows.json"))
    Path(source.path).write_text(json.dumps([EXAMPLES[format]]))
    assert detect_format([EXAMPLES[format]], source) == format
    assert isinstance(normalise(EXAMPLES[format], format, source, DataConfig()), Conversation)
    data = DataConfig(train=(source,))
    (row,) = tokenize_corpus(read_corpus(data, seed=0), tokenizer, data).train
    assert row.loss_mask.any()


def test_the_yaml_example_reads_files_with_such_columns(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "some/model"}, **yaml.safe_load(example)}))
    (tmp_path / "faq.jsonl").write_text('{"question": "Open?", "answer": "Yes."}')
    turns = [{"who": "Customer", "says": "Open?"}, {"who": "agent", "says": "Yes."}]
    (tmp_path / "support.jsonl").write_text(json.dumps({"thread": turns}))
    corpus = read_corpus(load_config(path).data, seed=0)
    expected = [("user", "Open?"), ("assistant", "Yes.")]
    assert [[(turn.role, turn.content) for turn in row.messages] for row in corpus.train] == [expected] * 2


def test_the_page_names_all_known_roles() -> None:
    (names,) = re.findall(r"^Known without a map, in capitals or not: (.*?)\. ", PAGE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", names) == list(ROLES)


def test_the_table_of_odd_rows_names_these_reasons() -> None:
    assert list(INVALID) == REASONS


@pytest.mark.parametrize("reason", INVALID)
def test_odd_rows_are_refused_for_the_reason_in_the_table(
    reason: str, tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    format, row, options = INVALID[reason]
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), format=format)
    good = chat(ASK, ANSWER) if format == "sharegpt" else EXAMPLES[format]
    Path(source.path).write_text(f"{json.dumps(good)}\n{'{' if row is None else json.dumps(row)}\n")
    data = DataConfig(train=(source,), max_invalid_fraction=1.0, **options)
    report = tokenize_corpus(read_corpus(data, seed=0), tokenizer, data).report
    assert (report.num_train, dict(report.invalid)) == (1, {reason: 1})


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("alpaca", {"instruction": "Go.", "input": None, "system": " ", "output": "Yes."}, ["Go.", "Yes."]),
        ("alpaca", {"input": "1 + 1", "output": "2"}, ["1 + 1", "2"]),
        ("alpaca", EXAMPLES["alpaca"], ["Put the words in order.\ntea, apple, rice", "apple, rice, tea"]),
        ("sharegpt", chat(ANSWER, ASK, ANSWER), ["Which?", "Red."]),
        ("sharegpt", chat(ASK, ANSWER, ASK), ["Which?", "Red."]),
        ("sharegpt", chat(ASK, ASK, ANSWER), ["Which?\n\nWhich?", "Red."]),
        ("sharegpt", chat(ASK, CALL, says("tool", "1"), says("tool", "2"), ANSWER), ["Which?", "", "1", "2", "Red."]),
    ],
)
def test_odd_rows_are_read_as_the_table_says(format: ConcreteFormat, row: object, expected: list[str]) -> None:
    found = normalise(row, format, SourceConfig(path="rows.json"), DataConfig())
    assert isinstance(found, Conversation)
    assert [message.content for message in found.messages] == expected


def test_the_report_is_written_like_that() -> None:
    report = DataReport(
        num_rows=1000,
        num_train=938,
        num_validation=50,
        invalid={"empty output": 1, "unknown role": 1},
        examples=(
            "/home/me/faq.jsonl:17: empty output",
            "/home/me/support.jsonl:71: unknown role: 'bystander' (turn 3)",
        ),
        num_dropped=10,
        max_seq_length=2048,
    )
    assert f"```\n{report}\n```" in PAGE
