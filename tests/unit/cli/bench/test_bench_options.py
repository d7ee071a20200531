from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.cli.bench.options import MAX_SIZE_BYTES, UNITS, Options, format_size, parse_size, read_options
from mlx_distributed.errors import ConfigError

GIVEN = {"nproc": "2", "sizes": "1KiB", "wire": "fp32", "against": "ring", "rounds": "3"}


def read(**changed: str) -> Options:
    return read_options("allreduce", **GIVEN | changed, tls=False, wires=("fp32", "int8"))


def test_what_is_given_is_read() -> None:
    options = read(nproc="3", sizes="4B, 64kib,1MiB,1024KiB", wire="int8,fp32", against="gloo,ring,gloo")
    assert options == Options("allreduce", 3, (4, 64 << 10, 1 << 20), ("int8", "fp32"), ("gloo", "ring"), 3)
    assert read(against="none").against == ()


@given(st.integers(1, MAX_SIZE_BYTES // 4))
def test_a_size_can_be_read_back(num_elements: int) -> None:
    assert parse_size(format_size(4 * num_elements)) == 4 * num_elements


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(4, "4 B"), (1 << 10, "1 KiB"), (3 << 19, "1536 KiB"), (1 << 30, "1 GiB")]
)
def test_a_size_is_written_in_the_largest_unit(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    size_bytes, refusal = None, ""
    try:
        size_bytes = parse_size(text)
    except ConfigError as error:
        refusal = str(error)
    assert refusal.startswith(f"--sizes {text}: ") if size_bytes is None else size_bytes % 4 == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("nproc", "1", "a single rank has nobody to send to; use 2 or more"),
        ("nproc", "0", "use 2 or more"),
        ("nproc", "-2", "use 2 or more"),
        ("nproc", "two", "must be a whole number from 2 to 64"),
        ("nproc", "1000", "use 64 or less"),
        ("rounds", "0", "at least one round"),
        ("sizes", "1MB", f"a whole number with a unit ({', '.join(UNITS)}), such as 64KiB"),
        ("sizes", "64", "such as 64KiB"),
        ("sizes", "1KiB,,2KiB", "nothing before or after a comma"),
        ("sizes", "", "nothing before or after a comma"),
        ("sizes", "0B", "use 4 B"),
        ("sizes", "7B", "a multiple of 4 B, from 4 B to 1 GiB; use 4 B"),
        ("sizes", "2GiB", "use 1 GiB"),
        ("wire", "fp8", "unknown; there are fp32, int8"),
        ("against", "nccl", "unknown; there are ring, gloo"),
        ("against", "ring,none", "unknown; there are ring, gloo"),
    ],
)
def test_nonsense_is_refused_in_one_paragraph(option: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(**{option: value})
    assert str(refused.value).startswith(f"--{option} ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
