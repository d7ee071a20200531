"""`Problem`: what is wrong with a value of a configuration."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """A value that cannot be used."""

    key: str
    """Dotted, as in `train.micro_batch_size`."""
    message: str
    """The rule and what would work."""
    others: tuple[str, ...] = ()
    """Further keys that the rule is about: changing one of them would help as well."""
