from __future__ import annotations

from xml.etree import ElementTree

from mlx_distributed.cli.bench.figures import Link
from mlx_distributed.cli.bench.picture import draw_links

SVG = "{http://www.w3.org/2000/svg}"


def links(size_bytes: int) -> list[Link]:
    """The more their numbers differ, the slower."""
    return [
        Link(i, j, 3, size_bytes, send_s=abs(i - j) * size_bytes / 1e9, round_trip_s=abs(i - j) / 1e3)
        for i in range(3)
        for j in range(3)
        if i != j
    ]


def test_a_picture_is_svg_with_a_cell_for_each_link() -> None:
    root = ElementTree.fromstring(draw_links([*links(1 << 20), *links(4 << 20)]))
    assert root.tag == f"{SVG}svg"
    texts = [text.text for text in root.iter(f"{SVG}text")]
    titles = ["one way, 1 MiB, GB/s", "one way, 4 MiB, GB/s", "round trip"]
    assert [text for text in texts if text in titles] == titles
    assert (texts.count("1.00"), texts.count("0.50")) == (8, 4)
    assert (texts.count("1.00 ms"), texts.count("2.00 ms")) == (4, 2)
    # A background, and in each of three tables a cell for every pair.
    assert len(list(root.iter(f"{SVG}rect"))) == 1 + 3 * 9


def test_everything_lies_within_the_picture() -> None:
    root = ElementTree.fromstring(draw_links(links(4)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for rectangle in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rectangle.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_the_better_the_darker() -> None:
    root = ElementTree.fromstring(draw_links(links(4)))
    fills = [rectangle.attrib["fill"] for rectangle in root.iter(f"{SVG}rect")]
    assert fills.count("#155291") == 8  # neighbours, in both tables
    assert fills.count("#81a2c6") == 4  # half as good, half the colour
