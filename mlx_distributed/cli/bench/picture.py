"""A picture of the links as SVG: tables whose cells are as dark as the link is good, compared with the best one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from mlx_distributed.cli.bench.figures import Link
from mlx_distributed.cli.bench.options import format_size
from mlx_distributed.cli.bench.table import format_time

CELL, MARGIN, TITLE = 72, 40, 56
"""Pixels: side of a cell, room around a table, and above one for its title and the numbers of the columns."""
_NONE, _BEST = (237, 243, 250), (21, 82, 145)
"""Colours of no link at all and of the best."""


def draw_links(links: Sequence[Link]) -> str:
    """An SVG with a table of the bandwidth for each size and one of the round trips, side by side."""
    num_ranks = links[0].num_ranks
    panels: list[tuple[str, Sequence[Link], Callable[[Link], float], Callable[[Link], str]]] = []
    for size_bytes in dict.fromkeys(link.size_bytes for link in links):
        of_size = [link for link in links if link.size_bytes == size_bytes]
        title = f"one way, {format_size(size_bytes)}, GB/s"
        panels.append((title, of_size, lambda link: link.gb_per_s, lambda link: f"{link.gb_per_s:.2f}"))
    panels.append(
        ("round trip", of_size, lambda link: 1 / link.round_trip_s, lambda link: format_time(link.round_trip_s))
    )

    side = max(num_ranks, 2) * CELL  # as wide as a title
    width, height = MARGIN + len(panels) * (side + MARGIN), TITLE + num_ranks * CELL + MARGIN
    svg = ElementTree.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "width": f"{width}"}
        | {"height": f"{height}", "font-family": "sans-serif", "font-size": "13", "text-anchor": "middle"},
    )
    _rectangle(svg, 0, 0, width, height, "white")
    for index, (title, shown, goodness, label) in enumerate(panels):
        _draw_table(svg, MARGIN + index * (side + MARGIN), title, shown, goodness, label)
    _text(svg, MARGIN, height - 14, "from the rank of a row to that of a column", "#222", anchor="start")
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _draw_table(
    svg: ElementTree.Element,
    left: float,
    title: str,
    links: Sequence[Link],
    goodness: Callable[[Link], float],
    label: Callable[[Link], str],
) -> None:
    num_ranks = links[0].num_ranks
    values = [goodness(link) for link in links]
    _text(svg, left, 20, title, "#222", anchor="start")
    for rank in range(num_ranks):
        _text(svg, left + (rank + 0.5) * CELL, TITLE - 8, str(rank), "#222")
        _text(svg, left - 14, TITLE + (rank + 0.5) * CELL + 5, str(rank), "#222")
        _rectangle(svg, left + rank * CELL, TITLE + rank * CELL, CELL, CELL, "#eee")
    for link, value in zip(links, values, strict=True):
        share = value / max(values)
        colour = [round(none + share * (best - none)) for none, best in zip(_NONE, _BEST, strict=True)]
        x, y = left + link.target * CELL, TITLE + link.source * CELL
        _rectangle(svg, x, y, CELL, CELL, "#{:02x}{:02x}{:02x}".format(*colour))
        _text(svg, x + CELL / 2, y + CELL / 2 + 5, label(link), "white" if share > 0.5 else "#222")


def _rectangle(svg: ElementTree.Element, x: float, y: float, width: float, height: float, fill: str) -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
    ElementTree.SubElement(svg, "rect", place | {"fill": fill, "stroke": "white"})


def _text(svg: ElementTree.Element, x: float, y: float, text: str, fill: str, anchor: str = "middle") -> None:
    place = {"x": f"{x:g}", "y": f"{y:g}", "fill": fill, "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", place).text = text
