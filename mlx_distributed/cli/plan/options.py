"""What a plan is told of the workers, as words of the command line."""

from __future__ import annotations

from collections.abc import Callable

from mlx_distributed.config.quantities import parse_quantity
from mlx_distributed.errors import ConfigError


def parse_speeds(text: str | None, num_workers: int) -> tuple[float, ...]:
    """Of each worker, relative to `--flops`. Raises ConfigError."""
    return _per_worker("speeds", text or "1", num_workers, lambda word: _number("speeds", word, "", "2,1"))


def parse_memory(text: str | None, num_workers: int, default_bytes: int) -> tuple[int, ...]:
    """Bytes of each worker. Raises ConfigError."""
    if text is None:
        return (default_bytes,) * num_workers
    return _per_worker("memory", text, num_workers, lambda word: int(_number("memory", word, "b", "16GB,8GB")))


def parse_flops(text: str) -> float:
    """Per second. Raises ConfigError."""
    return _number("flops", text, "", "3.5T")


def parse_link(text: str) -> float:
    """Bytes per second. Raises ConfigError."""
    return _number("link", text, "bit", "1Gbit") / 8


def _per_worker(option: str, text: str, num_workers: int, parse: Callable[[str], float]) -> tuple:
    values = tuple(parse(word.strip()) for word in text.split(","))
    if len(values) == 1:
        return values * num_workers
    if len(values) != num_workers:
        raise ConfigError(
            f"--{option} {text}: has {len(values)} values, and there are {num_workers} workers (parallel.nproc); give "
            "one for each, or one for all"
        )
    return values


def _number(option: str, text: str, unit: str, example: str) -> float:
    """A number with a prefix of a thousand, or with `unit` of 1024 (Ki, Mi, ...), and the unit."""
    value = parse_quantity(text, unit)
    if value is None:
        raise ConfigError(f"--{option} {text}: must be above 0 and written as in --{option} {example}")
    return value
