"""A picture of a step of a pipeline as SVG: when each worker computes what, measured above simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from mlx_distributed.parallel.simulate import Span

WIDTH, ROW, MARGIN, TITLE = 1400, 22, 90, 30
"""Pixels: length of the longest step, height of a worker, room at the left, and above a panel for its title."""
_COLOURS = {"F": ("#1d5c9e", "#6ea3d8"), "B": ("#b4541a", "#e6a06f"), "W": ("#3d7a3f", "#8dc08f")}
"""Of the kinds of actions, in stages of even and of odd chunks."""
_PLAIN = 11
"""Pixels that a number of two digits needs."""

Timeline = Sequence[Sequence[Span]]
"""By worker, in seconds from the begin of the step."""


def draw_timelines(title: str, panels: Mapping[str, Timeline]) -> str:
    """An SVG with a panel of the same scale for each timeline."""
    longest_s = max(span.end_s for timeline in panels.values() for spans in timeline for span in spans)
    num_workers = len(next(iter(panels.values())))
    panel = TITLE + num_workers * ROW
    width, height = MARGIN + WIDTH + 20, TITLE + len(panels) * panel + 20
    size = {"viewBox": f"0 0 {width} {height}", "width": f"{width}", "height": f"{height}"}
    font = {"font-family": "sans-serif", "font-size": "12"}
    svg = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **font})
    _rectangle(svg, 0, 0, width, height, "white")
    _text(svg, 10, 20, title)
    for number, (name, timeline) in enumerate(panels.items()):
        top = TITLE + number * panel
        end_s = max(span.end_s for spans in timeline for span in spans)
        _text(svg, 10, top + 20, f"{name}: {end_s:.3f} s")
        for worker, spans in enumerate(timeline):
            y = top + TITLE + worker * ROW
            _text(svg, 10, y + 15, f"worker {worker}")
            _rectangle(svg, MARGIN, y, WIDTH * end_s / longest_s, ROW, "#eee")
            for span in spans:
                _draw_span(svg, y, span, WIDTH / longest_s, num_workers)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def _draw_span(svg: ElementTree.Element, y: float, span: Span, scale: float, num_workers: int) -> None:
    kind, stage, microbatch = span.action
    x, width = MARGIN + scale * span.start_s, scale * (span.end_s - span.start_s)
    cell = _rectangle(svg, x, y, width, ROW, _COLOURS[kind][stage // num_workers % 2])
    ElementTree.SubElement(cell, "title").text = f"{span.action}: {span.start_s:.3f} s to {span.end_s:.3f} s"
    if width >= _PLAIN:
        _text(svg, x + width / 2, y + 15, str(microbatch), "white", "middle")


def _rectangle(
    svg: ElementTree.Element, x: float, y: float, width: float, height: float, fill: str
) -> ElementTree.Element:
    place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "width": f"{width:.2f}", "height": f"{height:.2f}"}
    return ElementTree.SubElement(svg, "rect", place | {"fill": fill, "stroke": "white", "stroke-width": "0.5"})


def _text(svg: ElementTree.Element, x: float, y: float, text: str, fill: str = "#222", anchor: str = "start") -> None:
    place = {"x": f"{x:.2f}", "y": f"{y:.2f}", "fill": fill, "text-anchor": anchor}
    ElementTree.SubElement(svg, "text", place).text = text
