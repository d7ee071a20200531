"""A preview as one page that needs nothing else. Rows are foreign text: all of it is escaped, and no script may run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from mlx_distributed.cli.preview.pieces import Piece, Section, ShownRow
from mlx_distributed.cli.preview.text import describe

_STYLE = """\
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1f2430; --dim: #5e6676; --line: #dfe3ea;
  --label: #d7f2dd; --label-text: #0b4a1f; --bar: #3fa45b; --special: #6a3fb5; --cut: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161b; --card: #1d2027; --text: #dde1e8; --dim: #99a1b0; --line: #343944;
    --label: #173d25; --label-text: #c4f0d0; --bar: #4bb56a; --special: #c3a6ff; --cut: #ff8a80; } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 2rem 0 .6rem; }
p, ul { margin: .2rem 0; color: var(--dim); }
ul { padding-left: 1.2rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 .8rem;
  overflow: hidden; }
.packed article { margin: 0; border-radius: 0; border-bottom: 0; }
.packed article + article { border-top: 3px dashed var(--dim); }
.packed article:last-child { border-bottom: 1px solid var(--line); }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .5rem .9rem; color: var(--dim); font-size: .85rem; }
header b { color: var(--text); }
header span:last-child { margin-left: auto; }
.strip { display: flex; height: 5px; background: var(--line); }
.strip i { min-width: 0; }
.strip .label { background: var(--bar); }
.strip .padding { background: repeating-linear-gradient(45deg, var(--dim) 0 2px, transparent 2px 5px); }
pre { margin: 0; padding: .8rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.65 ui-monospace, Menlo, Consolas, monospace; }
mark { background: var(--label); color: var(--label-text); border-radius: 3px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
b.special { color: var(--special); font-weight: 600; }
.break { color: var(--dim); opacity: .6; user-select: none; }
.note { color: var(--dim); font-style: italic; }
.note.cut { color: var(--cut); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin: .8rem 0 0; font-size: .9rem; color: var(--dim); }
"""
_BREAK = '<span class="break">\u21b5</span>\n'


def page(title: str, sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: what is previewed.
        sections: that are shown.
        notes: lines about the data, first.
    """
    return "".join(_page(title, sections, notes))


def _page(title: str, sections: Sequence[Section], notes: Sequence[str]) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
    yield f"<h1>{escape(title)}</h1>\n<ul>\n"
    for note in notes:
        yield f"<li>{escape(note.strip())}</li>\n"
    yield (
        '</ul>\n<div class="legend"><span><mark>labels</mark> are what the model learns to say</span>'
        '<span>context is what it is given</span><span><b class="special">&lt;token&gt;</b> is one token of its own'
        '</span><span><span class="break">\u21b5</span> is a line break of the text</span></div>\n'
    )
    for section in sections:
        yield f"<section{' class=packed' if section.is_packed else ''}>\n<h2>{escape(section.title)}</h2>\n"
        for row in section.rows:
            yield from _row(row)
        yield "</section>\n"
    yield "</body>\n</html>\n"


def _row(row: ShownRow) -> Iterator[str]:
    place, counts = escape(str(row.place)), escape(describe(row))
    yield f"<article>\n<header><b>row {row.number}</b><span>{place}</span><span>{counts}</span></header>\n"
    yield '<div class="strip">'
    for piece in row.pieces:
        yield f'<i{" class=label" if piece.is_label else ""} style="flex:{piece.num_tokens}"></i>'
    if row.num_padding:
        yield f'<i class="padding" style="flex:{row.num_padding}"></i>'
    yield '</div>\n<pre dir="auto">'
    for piece in row.pieces:
        yield _piece(piece)
    if row.num_cut:
        yield f'\n<span class="note cut">cut here: {row.num_cut} tokens more</span>'
    if row.num_padding:
        yield f'\n<span class="note">{row.num_padding} tokens of padding</span>'
    yield "</pre>\n</article>\n"


def _piece(piece: Piece) -> str:
    text = escape(piece.text).replace("\n", _BREAK)
    if piece.is_special:
        text = f'<b class="special">{text}</b>'
    return f"<mark>{text}</mark>" if piece.is_label else text
