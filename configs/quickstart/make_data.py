"""Write the rows of the quick start: the numbers 1 to 999 in English words and as Roman numerals.

Run:
    python configs/quickstart/make_data.py

The files land beside this script and are always the same. A tenth of the numbers, chosen by a hash, is held out with
both of its rows, so that `validation.json` asks only for numbers that training never showed. The other numbers go in
turn to the two formats that users bring most often.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, object]

NUMBERS = range(1, 1000)

UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

ROMAN_VALUES = (900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
ROMAN_SYMBOLS = ("CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I")


def to_words(number: int) -> str:
    """The English words of a number of `NUMBERS`: 324 is "three hundred twenty-four"."""
    if number < 20:
        return (UNITS + TEENS)[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return TENS[tens] + (f"-{UNITS[rest]}" if rest else "")
    hundreds, rest = divmod(number, 100)
    return f"{UNITS[hundreds]} hundred" + (f" {to_words(rest)}" if rest else "")


def to_roman(number: int) -> str:
    """The Roman numeral of a number of `NUMBERS`: 793 is "DCCXCIII"."""
    numeral = ""
    for value, symbol in zip(ROMAN_VALUES, ROMAN_SYMBOLS, strict=True):
        count, number = divmod(number, value)
        numeral += symbol * count
    return numeral


def held_out_numbers() -> set[int]:
    """A tenth of `NUMBERS` for validation, by their hashes: scattered over all sizes, and the same on every machine."""
    by_hash = sorted(NUMBERS, key=lambda number: hashlib.sha256(str(number).encode()).hexdigest())
    return set(by_hash[: len(NUMBERS) // 10])


def exchanges(number: int) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of a number."""
    return [
        (f"Write {number} in words.", to_words(number)),
        (f"Write {number} as a Roman numeral.", to_roman(number)),
    ]


def alpaca(numbers: Iterable[int]) -> list[Row]:
    pairs = [pair for number in numbers for pair in exchanges(number)]
    return [{"instruction": prompt, "input": "", "output": answer} for prompt, answer in pairs]


def sharegpt(numbers: Iterable[int]) -> list[Row]:
    pairs = [pair for number in numbers for pair in exchanges(number)]
    return [
        {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
        for prompt, answer in pairs
    ]


def make_files() -> dict[str, list[Row]]:
    """The rows of each file, by file name."""
    held_out = held_out_numbers()
    training = [number for number in NUMBERS if number not in held_out]
    return {
        "alpaca.json": alpaca(training[0::2]),
        "sharegpt.json": sharegpt(training[1::2]),
        "validation.json": alpaca(sorted(held_out)),
    }


def to_json(rows: Iterable[Row]) -> str:
    """A JSON array with one row a line, so that a diff shows the rows that changed."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main() -> None:
    for name, rows in make_files().items():
        (Path(__file__).parent / name).write_text(to_json(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
