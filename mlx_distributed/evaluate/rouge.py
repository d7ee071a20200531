"""ROUGE-1, ROUGE-2 and ROUGE-L of one answer (Lin 2004): F1 as the package rouge-score gives it, to the last digit."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from mlx_distributed.config.schema import RougeTokenize

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = {
    "ascii": re.compile(r"[a-z0-9]+"),
    "unicode": re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+"),
}


def words(text: str, tokenize: RougeTokenize) -> list[str]:
    """Those that are compared, in lower case. Nothing is stemmed."""
    return _WORDS[tokenize].findall(text.lower())


def rouge_n(generated: Sequence[str], reference: Sequence[str], n: int) -> float:
    """From the runs of `n` words that two texts share; 0 where one of them has none."""
    mine, theirs = (Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (generated, reference))
    return _f1((mine & theirs).total(), mine.total(), theirs.total())


def rouge_l(generated: Sequence[str], reference: Sequence[str]) -> float:
    """From the longest common subsequence of two texts; 0 where one of them has no words."""
    return _f1(_lcs_length(generated, reference), len(generated), len(reference))


def _f1(num_shared: int, num_generated: int, num_reference: int) -> float:
    precision, recall = num_shared / max(num_generated, 1), num_shared / max(num_reference, 1)
    return 2 * precision * recall / (precision + recall) if num_shared else 0.0


def _lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """A row of the usual table at a time, as the bits of a number (Hyyro 2004): a bit is 0 where the row goes up."""
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(one):
        places[word] |= 1 << place
    row = all_places = (1 << len(one)) - 1
    for word in other:
        shared = row & places.get(word, 0)
        row = ((row + shared) | (row - shared)) & all_places
    return len(one) - row.bit_count()
