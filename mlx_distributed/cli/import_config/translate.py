"""A configuration of another program in, the values of ours and the fate of every key out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mlx_distributed.cli.import_config.rules import Fate, Place, Rule, Theirs, Tool, Unusable, plain, shown

UNKNOWN = Fate("no counterpart", "is not known here")
EMPTY = Fate("not needed", "empty")


@dataclass(frozen=True)
class Finding:
    """One key and what became of it."""

    key: str
    value: Any
    fate: Fate
    default: bool = False
    """It does not stand in the file."""


@dataclass(frozen=True)
class Translation:
    """All of a file."""

    tool: Tool
    findings: tuple[Finding, ...]
    """Every key of the file once, in its order, and then the defaults that are written out."""
    values: Mapping[str, Any]
    """By dotted key of ours."""
    sources: Mapping[str, str]
    """By the same: which key it comes from, as a comment."""

    def of(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.fate.kind == kind and not finding.default]


def leaves(node: yaml.Node, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and plain value of all that is no mapping, nor a list with mappings in it."""
    children: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(name.value, child) for name, child in node.value]
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
        children = [(str(index), item) for index, item in enumerate(node.value)]
    if not children:
        yield key, plain(node)
    for name, child in children:
        yield from leaves(child, f"{key}.{name}" if key else name)


def translate(root: yaml.MappingNode, tool: Tool, num_devices: int, folder: Path, base: Path) -> Translation:
    """What the configuration `root` of `tool` is here.

    Args:
        num_devices: that it was meant for.
        folder: of its file.
        base: that the paths of ours are relative to.
    """
    given = {name: value for name, value in plain(root).items() if value is not None}
    theirs = Theirs({**tool.defaults, **given}, num_devices, folder, base)
    findings = [Finding(key, value, _decide(key, value, theirs, tool)) for key, value in leaves(root)]
    for key, value in tool.defaults.items():
        if key not in given:
            fate = _decide(key, value, theirs, tool)
            if fate.values:
                findings.append(Finding(key, value, fate, default=True))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    kept = []
    for finding in findings:
        taken = next((ours for ours, value in finding.fate.values.items() if _clashes(values, ours, value)), None)
        if taken is not None and finding.default:
            continue  # the file has said it by another key
        if taken is not None:
            words = f"{taken} is {shown(values[taken])} already, from {sources[taken]}"
            finding = replace(finding, fate=Fate("no counterpart", words))
        for ours, value in finding.fate.values.items():
            values[ours] = {**values.get(ours, {}), **value} if isinstance(value, Mapping) else value
            sources.setdefault(ours, _comment(finding))
        kept.append(finding)
    for ours, value in tool.implied(theirs).items():
        if ours not in values:
            values[ours], sources[ours] = value, f"as {tool.title} does"
    return Translation(tool, tuple(kept), values, sources)


def _comment(finding: Finding) -> str:
    key = f"{finding.key}, by default" if finding.default else finding.key
    return f"{key}: {finding.fate.words}" if finding.fate.words else key


def _decide(key: str, value: Any, theirs: Theirs, tool: Tool) -> Fate:
    rule = _rule(key, tool)
    if rule is None:
        return UNKNOWN
    if value is None:
        return EMPTY
    try:
        fate = rule.decide(value, Place(key, theirs))
    except Unusable as error:
        return Fate("refused", f"the value {error}")
    assert all(any(_stands_for(target, ours) for target in rule.targets) for ours in fate.values), (key, fate)
    return fate


def _rule(key: str, tool: Tool) -> Rule | None:
    """That of the key, or of one above it that covers it."""
    parts = ["*" if part.isdecimal() else part for part in key.split(".")]
    if (rule := tool.rules.get(".".join(parts))) is not None:
        return rule
    above = (tool.rules.get(".".join(parts[:length])) for length in range(len(parts) - 1, 0, -1))
    return next((rule for rule in above if rule is not None and rule.covers), None)


def _stands_for(target: str, ours: str) -> bool:
    return re.fullmatch(re.escape(target).replace(r"\*", r"\d+"), ours) is not None


def _clashes(values: Mapping[str, Any], ours: str, value: Any) -> bool:
    """Whether `ours` is something else already; mappings are merged."""
    if isinstance(value, Mapping):
        return any(_clashes(values.get(ours, {}), name, each) for name, each in value.items())
    return ours in values and bool(values[ours] != value)
