"""YAML as nodes that know where they stand: reading, showing, replacing one of them.

Scalars mean what they mean in YAML 1.2, not in PyYAML's 1.1: `1e-5` is a float; `no`, `on`, `1:30` and `007` are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

COMMAND_LINE = "command line"
"""Stands for the file name in the marks of nodes that come from an override."""
TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)\Z|\.nan\Z", re.I
)
SCALARS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"),
    "float": _FLOAT,
    "merge": re.compile(r"<<\Z"),
}


MAX_NODES = 100_000
"""Of a configuration, with its aliases written out."""


class Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: `1e-5` is a float; `no`, `on`, `1:30` and `007` are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _name, _pattern in SCALARS.items():
    Loader.add_implicit_resolver(TAG + _name, _pattern, None)


def beginning(name: str) -> yaml.Mark:
    """The place of what has no node of its own."""
    return yaml.Mark(name, 0, 0, 0, "", 0)


def compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of `text`, with `name` in their marks; None for an empty text."""
    loader = Loader(text)
    loader.name = name
    root = loader.get_single_node()
    if root is not None and _written_out(root, {}) > MAX_NODES:
        raise yaml.composer.ComposerError(None, None, "aliases that stand for far too much", root.start_mark)
    return root


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below `node` with every alias written out. A few lines of aliases can stand for billions."""
    if id(node) not in sizes:
        sizes[id(node)] = 0  # where the node contains itself, which is refused elsewhere
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_written_out(child, sizes) for child in children)
    return sizes[id(node)]


def is_null(node: yaml.Node) -> bool:
    return bool(node.tag == TAG + "null")


def show(node: yaml.Node) -> str:
    """A value on one line, for a message."""
    if isinstance(node, yaml.MappingNode):
        text = "{" + ", ".join(f"{show(key)}: {show(child)}" for key, child in node.value) + "}"
    elif isinstance(node, yaml.SequenceNode):
        text = "[" + ", ".join(map(show, node.value)) + "]"
    else:
        text = " ".join(node.value.split()) or ("null" if is_null(node) else '""')
    return text if len(text) <= 80 else f"{text[:77]}..."


def construct(node: yaml.Node) -> Any:
    """The plain Python value of `node`.

    Raises:
        yaml.YAMLError: there is none, as for an unknown tag.
    """
    try:
        return Loader("").construct_object(node, deep=True)
    except ValueError as error:  # `!!int x`, or more digits than Python converts
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def expand_sources(root: yaml.MappingNode) -> None:
    """Write `data.train: rows.json` and `data.train: {path: rows.json}` out as a list of one mapping."""
    for name, data in root.value:
        if name.value != "data" or not isinstance(data, yaml.MappingNode):
            continue
        for index, (split, sources) in enumerate(data.value):
            if split.value in ("train", "validation") and not is_null(sources):
                items = sources.value if isinstance(sources, yaml.SequenceNode) else [sources]
                items = [_source(item) if isinstance(item, yaml.ScalarNode) else item for item in items]
                marks = sources.start_mark, sources.end_mark
                data.value[index] = split, yaml.SequenceNode(TAG + "seq", items, *marks)


def _source(path: yaml.ScalarNode) -> yaml.MappingNode:
    key = yaml.ScalarNode(TAG + "str", "path", path.start_mark, path.end_mark)
    return yaml.MappingNode(TAG + "map", [(key, path)], path.start_mark, path.end_mark)


def replaced(node: yaml.Node | None, names: Sequence[str], value: yaml.Node, done: str) -> yaml.Node:
    """A copy of `node`, which stands at the dotted key `done`, in which the value at `names` is `value`.

    Raises:
        WrongValue: there is no such place in it.
    """
    if not names:
        return value
    name, rest = names[0], names[1:]
    key = f"{done}.{name}" if done else name
    if node is None or is_null(node):
        kind, tag = (yaml.SequenceNode, "seq") if name.isdecimal() else (yaml.MappingNode, "map")
        node = kind(TAG + tag, [], value.start_mark, value.end_mark)
    if isinstance(node, yaml.SequenceNode):
        count = len(node.value)
        if not name.isdecimal() or int(name) > count:
            raise WrongValue(value, key, f"{done} is a list of {count}; use {done}.0 to {done}.{count}")
        items = [*node.value, None][: max(count, int(name) + 1)]
        items[int(name)] = replaced(items[int(name)], rest, value, key)
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    if not isinstance(node, yaml.MappingNode):
        raise WrongValue(value, key, f"{done}={show(node)} has no keys beneath it; set {done} itself")
    old = [(key_node, child) for key_node, child in node.value if key_node.value == name]
    key_node = old[-1][0] if old and rest else yaml.ScalarNode(TAG + "str", name, value.start_mark, value.end_mark)
    child = replaced(old[-1][1] if old else None, rest, value, key)
    entries = [(other, child) for other, child in node.value if other.value != name]
    return yaml.MappingNode(node.tag, [*entries, (key_node, child)], node.start_mark, node.end_mark)


class WrongValue(Exception):
    """A value that cannot be used: its node, its key, the rule."""

    def __init__(self, node: yaml.Node, key: str, rule: str) -> None:
        self.node, self.key, self.rule = node, key, rule
