from __future__ import annotations

import json
from pathlib import Path

import pytest
import sacrebleu

from mlx_distributed.cli.distributed import main

GENERATED = ["the cat sat on the mat", "", "one\u2028two three four"]
REFERENCES = ["the cat sat on a mat", "nothing", "one\u2028two three four"]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / "answers.txt", GENERATED), write(tmp_path / "references", REFERENCES)]
    assert main(["score", *files, "--metrics", "bleu,exact_match", "--bleu-tokenize", "char"]) == 0
    bleu, exact_match = capsys.readouterr().out.splitlines()
    expected = sacrebleu.corpus_bleu(GENERATED, [REFERENCES], tokenize="char").score
    assert bleu.startswith(f"bleu {expected:.4f} [")
    assert "|tok:char|" in bleu
    assert exact_match.startswith("exact_match 0.3333 [0.0000, ")
    assert main(["score", *files]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_lines_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        json.dumps({"row": row, "generated": one, "reference": other})
        for row, (one, other) in enumerate(zip(GENERATED, REFERENCES, strict=True))
    ]
    both = write(tmp_path / "samples.jsonl", records)
    strings = write(tmp_path / "strings.jsonl", [json.dumps(text) for text in REFERENCES])
    found = []
    for references in (both, strings):
        assert main(["score", both, references, "--metrics", "rougeL", "--rouge-tokenize", "unicode"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert found[0].startswith("rougeL 0.6111 [")


@pytest.mark.parametrize(
    ("predictions", "references", "options", "words"),
    [
        ("a\nb\n", "a\n", [], "has 2 lines and {folder}/references.txt has 1; every prediction needs one reference"),
        ("", "", [], "has no lines"),
        ("a\n", "a\n", ["--metrics", "bleu,rouge"], "'rouge' is not known here; use exact_match, bleu, chrf, rouge1"),
        ("a\n", None, [], "references.txt cannot be read: No such file or directory"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    predictions: str,
    references: str | None,
    options: list[str],
    words: str,
) -> None:
    (tmp_path / "answers.txt").write_text(predictions)
    if references is not None:
        (tmp_path / "references.txt").write_text(references)
    assert main(["score", str(tmp_path / "answers.txt"), str(tmp_path / "references.txt"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words.format(folder=tmp_path) in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "answers.jsonl:2: not JSON"),
        ("[" * 100_000, "answers.jsonl:2: not JSON"),
        ("7", "answers.jsonl:2: must be a JSON string, or an object with a text as 'generated'"),
        ('{"text": "a"}', "must be a JSON string"),
    ],
)
def test_a_line_that_holds_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str) -> None:
    path = write(tmp_path / "answers.jsonl", ['"a"', line])
    assert main(["score", path, path]) == 2
    assert words in capsys.readouterr().err


def test_text_that_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.txt"
    path.write_bytes(b"ab\xff\n")
    assert main(["score", str(path), str(path)]) == 2
    assert "answers.txt is not UTF-8 text: invalid start byte at byte 2; save it as UTF-8" in capsys.readouterr().err
