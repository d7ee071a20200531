"""Labels of real rows: what is trained, decoded, must be what the assistant says and the stop token, and nothing else.

Every row of the files goes through the data path, once for each of eight families of chat templates, with a tokenizer
trained on the rows. What must come out is said by the conversation itself (tests/chat_families.py), not by the code
that finds the turns. The rows are also cut to half the median length, and packed eight at a time.

    uv run python tests/benchmarks/labels.py --data FOLDER

exit status: 0 every label is right; 1 some are not, or a row is refused that a template has a place for
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Table, parser, print_machine

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from chat_families import Family

    from mlx_distributed.data import Conversation, Corpus, Row

VOCAB_SIZE = 4096
PACKED = 8
"""Rows in a micro-batch."""


def labels_of(row: Row, tokenizer: Any) -> list[str]:
    """The text of every run of targets; white space before it may be of the same token as what the header ends with."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.loss_mask, [False]])))
    runs = [row.tokens[start:stop] for start, stop in edges.reshape(-1, 2)]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False).lstrip() for run in runs]


def check(corpus: Corpus, family: Family, tokenizer: Any) -> tuple[Counter[str], Counter[str]]:
    """Rows refused, by reason; and what is wrong."""
    import numpy as np

    from mlx_distributed.config.schema import DataConfig
    from mlx_distributed.data.batch import pack
    from mlx_distributed.data.tokenize import tokenize_rows

    def rows_of(conversations: list[Conversation], **settings: Any) -> list[tuple[Row | None, str]]:
        outcomes = tokenize_rows(conversations, tokenizer, DataConfig(**settings))
        return [(outcome.row, outcome.invalid.reason if outcome.invalid else "no label left") for outcome in outcomes]

    refused, wrong = Counter[str](), Counter[str]()
    taken: list[tuple[Conversation, Row]] = []
    for conversation, (row, reason) in zip(corpus.train, rows_of(corpus.train, max_seq_length=1 << 20), strict=True):
        turns = family.turns(conversation)
        if row is None:
            refused[reason] += 1
            wrong["refused without need"] += turns is not None
            continue
        taken.append((conversation, row))
        said = None if turns is None else [turn.lstrip() + family.stop for turn in turns]
        wrong["labels"] += labels_of(row, tokenizer) != said
    rows = [row for _, row in taken]
    if rows:
        limit = int(np.median([len(row.tokens) for row in rows])) // 2
        cut_rows = rows_of([conversation for conversation, _ in taken], max_seq_length=limit, overlong="truncate")
        for row, (cut, _) in zip(rows, cut_rows, strict=True):
            left = cut.loss_mask if cut else np.zeros(min(limit, len(row.tokens)), bool)
            same = cut is None or np.array_equal(cut.tokens, row.tokens[:limit])
            wrong["truncated"] += not (same and np.array_equal(left, row.loss_mask[:limit]))
    for start in range(0, len(rows), PACKED):
        together = sorted(rows[start : start + PACKED], key=lambda row: len(row.tokens))
        batch = pack(together)
        ends = accumulate(len(row.tokens) for row in together)
        for row, end in zip(together, ends, strict=True):
            place = slice(end - len(row.tokens), end)
            tokens, loss_mask = batch.tokens[0, place], batch.loss_mask[0, place]
            wrong["packed"] += not (np.array_equal(tokens, row.tokens) and np.array_equal(loss_mask, row.loss_mask))
    return refused, +wrong


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with the files of rows")
    folder = arguments.parse_args().data
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from chat_families import FAMILIES, make_tokenizer

    from mlx_distributed.config.schema import DataConfig, SourceConfig
    from mlx_distributed.data import read_corpus
    from mlx_distributed.data.files import SUFFIXES

    print_machine()
    begun_s = time.perf_counter()
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    sources = {file.name: DataConfig((SourceConfig(str(file)),), max_invalid_fraction=1.0) for file in files}
    corpora = {name: read_corpus(data, 0) for name, data in sources.items()}
    texts = [message.content for corpus in corpora.values() for row in corpus.train for message in row.messages]
    table = Table("file                        ", "template", "rows", "wrong", "refused")
    num_wrong, num_rows = 0, sum(corpus.report.num_rows for corpus in corpora.values())
    for family_name, family in FAMILIES.items():
        tokenizer = make_tokenizer(family, texts, VOCAB_SIZE)
        for name, corpus in corpora.items():
            refused, wrong = check(corpus, family, tokenizer)
            refused.update(corpus.report.invalid)
            num_wrong += wrong.total()
            shown = [", ".join(f"{count} {what}" for what, count in counts.items()) for counts in (wrong, refused)]
            table.print(name, family_name, str(corpus.report.num_rows), shown[0] or "0", shown[1] or "0")
    duration_s = time.perf_counter() - begun_s
    print(f"{num_wrong} wrong in all, of {num_rows} rows x {len(FAMILIES)} templates; {duration_s:.0f} s")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
