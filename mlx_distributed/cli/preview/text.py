"""A preview as text: in colour on a terminal, and legible in a pipe, since labels are on lines of their own."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from mlx_distributed.cli.preview.pieces import Section, ShownRow

LABEL, CONTEXT = "  > ", "    "
_BREAK = "\u21b5"
_LABEL_STYLE, _SPECIAL_STYLE, _MARK_STYLE, _TITLE_STYLE = "green", "bold", "dim", "bold"
LEGEND = (
    f"{LABEL.strip()} marks labels, which the model learns to say; the rest is context. {_BREAK} is a line break of "
    "the text, tokens such as <|im_end|> are bold on a terminal, and what cannot be seen is written as in \\x1b"
)


def show(sections: Sequence[Section], notes: Sequence[str]) -> None:
    """On standard output.

    Args:
        sections: that are shown.
        notes: lines about the data, first.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal need not know all characters that rows have.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Not left to rich, which takes FORCE_COLOR, as CI systems set it, for a terminal.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    for line in (*notes, LEGEND):
        console.print(Text(line, _MARK_STYLE), soft_wrap=True)
    for section in sections:
        console.print()
        for text in _section(section):
            console.print(text, soft_wrap=True)


def describe(row: ShownRow) -> str:
    """Counts of a row."""
    parts = [f"{row.num_tokens} tokens", f"{row.num_labels} labels"]
    if row.num_padding:
        parts.append(f"{row.num_padding} of padding")
    if row.num_cut:
        parts.append(f"{row.num_cut} cut off")
    return ", ".join(parts)


def _section(section: Section) -> Iterator[Text]:
    yield Text(f"== {section.title}", _TITLE_STYLE)
    for index, row in enumerate(section.rows):
        border = "-- border: " if section.is_packed and index else "-- "
        yield Text(f"{border}row {row.number}  {row.place}  {describe(row)}", _MARK_STYLE)
        yield from _lines(row)
        if row.num_cut:
            yield Text(f"{CONTEXT}[cut here: {row.num_cut} tokens more]", _MARK_STYLE)
        if row.num_padding:
            yield Text(f"{CONTEXT}[{row.num_padding} tokens of padding]", _MARK_STYLE)


def _lines(row: ShownRow) -> Iterator[Text]:
    """A line ends where one of the text does, and where labels begin or end."""
    line, is_label = Text(CONTEXT), False
    for piece in row.pieces:
        if piece.is_label != is_label:
            if line.plain not in (LABEL, CONTEXT):
                yield line
            line, is_label = Text(LABEL if piece.is_label else CONTEXT), piece.is_label
        style = f"{_LABEL_STYLE if is_label else ''} {_SPECIAL_STYLE if piece.is_special else ''}".strip()
        first, *others = piece.text.split("\n")
        line.append(first, style)
        for other in others:
            line.append(_BREAK, _MARK_STYLE)
            yield line
            line = Text(LABEL if is_label else CONTEXT)
            line.append(other, style)
    if line.plain not in (LABEL, CONTEXT):
        yield line
