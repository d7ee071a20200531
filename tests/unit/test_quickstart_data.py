from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "configs" / "quickstart"
FILES = ["alpaca.json", "sharegpt.json", "validation.json"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = load_script()


def read_pairs(name: str) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of a committed file, read without the script."""
    rows = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    if name == "sharegpt.json":
        return [tuple(turn["value"] for turn in row["conversations"]) for row in rows]
    return [(row["instruction"], row["output"]) for row in rows]


def numbers_of(name: str) -> set[int]:
    return {int(re.findall(r"\d+", prompt)[0]) for prompt, _ in read_pairs(name)}


def read_words(words: str) -> int:
    """The number that the words name, by adding up the values of the words."""
    values = {word: value for value, word in enumerate(make_data.UNITS + make_data.TEENS)}
    values |= {word: 10 * value for value, word in enumerate(make_data.TENS) if value > 1}
    total = 0
    for word in words.replace("-", " ").split():
        total = total * 100 if word == "hundred" else total + values[word]
    return total


def read_roman(numeral: str) -> int:
    """The number of a Roman numeral: a smaller letter before a larger one is taken off."""
    values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[letter] for letter in numeral]
    following = [*values[1:], 0]
    return sum(-value if value < after else value for value, after in zip(values, following, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_the_script_makes(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == make_data.to_json(make_data.make_files()[name])


def test_the_script_writes_every_file_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "__file__", str(tmp_path / "make_data.py"))
    make_data.main()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: (FOLDER / name).read_bytes() for name in FILES
    }


def test_no_held_out_number_is_in_training() -> None:
    held_out = numbers_of("validation.json")
    alpaca, sharegpt = numbers_of("alpaca.json"), numbers_of("sharegpt.json")
    assert len(held_out) == 99
    assert len(alpaca) == len(sharegpt) == 450
    assert not held_out & (alpaca | sharegpt)
    assert not alpaca & sharegpt
    assert held_out | alpaca | sharegpt == set(range(1, 1000))


@pytest.mark.parametrize(
    ("number", "words", "numeral"),
    [
        (1, "one", "I"),
        (19, "nineteen", "XIX"),
        (40, "forty", "XL"),
        (99, "ninety-nine", "XCIX"),
        (100, "one hundred", "C"),
        (324, "three hundred twenty-four", "CCCXXIV"),
        (793, "seven hundred ninety-three", "DCCXCIII"),
        (906, "nine hundred six", "CMVI"),
        (999, "nine hundred ninety-nine", "CMXCIX"),
    ],
)
def test_known_values(number: int, words: str, numeral: str) -> None:
    assert make_data.to_words(number) == words
    assert make_data.to_roman(number) == numeral


@pytest.mark.parametrize("name", FILES)
def test_every_answer_reads_back_as_its_number(name: str) -> None:
    for prompt, answer in read_pairs(name):
        words = re.fullmatch(r"Write (\d+) in words\.", prompt)
        numeral = re.fullmatch(r"Write (\d+) as a Roman numeral\.", prompt)
        if words:
            assert read_words(answer) == int(words[1])
        else:
            assert numeral
            assert read_roman(answer) == int(numeral[1])


def test_every_roman_numeral_is_in_its_shortest_form() -> None:
    shortest = re.compile(r"(CM|CD|D?C{0,3})(XC|XL|L?X{0,3})(IX|IV|V?I{0,3})")
    assert all(shortest.fullmatch(make_data.to_roman(number)) for number in make_data.NUMBERS)
