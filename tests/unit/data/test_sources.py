from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_distributed.config.schema import DataConfig, SourceConfig
from mlx_distributed.data.sources import choose_validation, read_corpus
from mlx_distributed.errors import DataError


def alpaca(folder: Path, name: str, outputs: list[str | None]) -> SourceConfig:
    rows = [{"instruction": f"question {number}", "output": output} for number, output in enumerate(outputs)]
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return SourceConfig(path=str(path))


def answers(conversations: object) -> list[str]:
    return [conversation.messages[-1].content for conversation in conversations]  # type: ignore[attr-defined]


def test_sources_keep_their_order_places_and_weights(tmp_path: Path) -> None:
    first = alpaca(tmp_path, "a.jsonl", ["a", "b"])
    second = replace(alpaca(tmp_path, "b.jsonl", ["c"]), weight=2.0)
    held = alpaca(tmp_path, "v.jsonl", ["d"])
    corpus = read_corpus(DataConfig(train=(first, second), validation=(held,)), seed=0)
    assert answers(corpus.train) == ["a", "b", "c"]
    assert answers(corpus.validation) == ["d"]
    assert corpus.train_weights == ((0, 2, 1.0), (2, 3, 2.0))
    assert [str(place) for place in corpus.train_places] == [f"{first.path}:1", f"{first.path}:2", f"{second.path}:1"]
    assert str(corpus.validation_places[0]) == f"{held.path}:1"
    assert str(corpus.report) == "rows read: 4 (3 to train on, 1 for validation)"


def test_invalid_rows_are_skipped_counted_and_shown(tmp_path: Path) -> None:
    source = alpaca(tmp_path, "a.jsonl", ["a"] * 70 + [None] * 6)
    with Path(source.path).open("a") as file:
        file.write("\n{\n")
    corpus = read_corpus(DataConfig(train=(source,)), seed=0)
    assert len(corpus.train) == 70
    assert corpus.report.invalid == {"empty output": 6, "line is not valid JSON": 1}
    lines = corpus.report.lines()
    assert lines[:2] == [
        "rows read: 77 (70 to train on, 0 for validation)",
        "invalid rows skipped: 7 (6 empty output, 1 line is not valid JSON)",
    ]
    assert lines[2:] == [f"  {source.path}:{line}: empty output" for line in range(71, 76)]


def test_too_many_invalid_rows_are_refused(tmp_path: Path) -> None:
    source = alpaca(tmp_path, "a.jsonl", ["a"] * 8 + [None] * 2)
    with pytest.raises(DataError) as refusal:
        read_corpus(DataConfig(train=(source,)), seed=0)
    message = str(refusal.value)
    assert message.startswith("2 of 10 rows are invalid (2 empty output; the first: ")
    assert f"{source.path}:9: empty output; {source.path}:10: empty output" in message
    assert "data.max_invalid_fraction=0.1" in message
    assert len(read_corpus(DataConfig(train=(source,), max_invalid_fraction=0.2), seed=0).train) == 8


def test_a_source_without_a_valid_row_is_refused_by_name(tmp_path: Path) -> None:
    good, bad = alpaca(tmp_path, "a.jsonl", ["a"] * 50), alpaca(tmp_path, "b.jsonl", [None])
    bad = replace(bad, format="alpaca")
    with pytest.raises(DataError, match=r"data\.validation\.0 .*b\.jsonl\): no valid row"):
        read_corpus(DataConfig(train=(good,), validation=(bad,)), seed=0)


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    source = replace(alpaca(tmp_path, "a.jsonl", ["a"]), columns={"instrution": "question"})
    with pytest.raises(DataError, match=r"data\.train\.0\.columns names 'instrution', but the format alpaca has"):
        read_corpus(DataConfig(train=(source,)), seed=0)


def test_the_format_is_detected_or_given(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b", "text": "c"}]))
    auto, text = SourceConfig(path=str(path)), SourceConfig(path=str(path), format="text")
    assert answers(read_corpus(DataConfig(train=(auto, text)), seed=0).train) == ["b", "c"]


def test_validation_rows_are_chosen_by_seed_and_position_alone(tmp_path: Path) -> None:
    outputs: list[str | None] = [f"answer {number}" for number in range(200)]
    corpus = read_corpus(DataConfig(train=(alpaca(tmp_path, "a.jsonl", outputs),), val_fraction=0.25), seed=1)
    held = set(answers(corpus.validation))
    assert 30 < len(held) < 70
    assert held.isdisjoint(answers(corpus.train))
    assert corpus.train_weights == ((0, len(corpus.train), 1.0),)

    longer = [None, *outputs[1:], *("new",) * 100]
    more = (alpaca(tmp_path, "a.jsonl", longer), alpaca(tmp_path, "b.jsonl", ["other"] * 9))
    again = read_corpus(DataConfig(train=more, val_fraction=0.25), seed=1)
    assert set(answers(again.validation)) - {"new", "other"} == held - {"answer 0"}
    assert set(answers(read_corpus(DataConfig(train=more, val_fraction=0.25), seed=2).validation)) != held


def test_a_larger_fraction_only_adds_rows() -> None:
    small, large = choose_validation(500, 0.1, 7), choose_validation(500, 0.3, 7)
    assert np.all(large[small])
    assert small.sum() < large.sum()
    assert not choose_validation(500, 0.0, 7).any()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_need_a_row(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="both need at least one"):
        read_corpus(DataConfig(train=(alpaca(tmp_path, "a.jsonl", ["a", "b"]),), val_fraction=fraction), seed=0)
