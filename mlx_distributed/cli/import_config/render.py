"""What is written and printed: our YAML, and the report on every key."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from mlx_distributed.cli.import_config.rules import shown
from mlx_distributed.cli.import_config.translate import Finding, Translation
from mlx_distributed.config.dump import to_inline
from mlx_distributed.config.schema import Config, SourceConfig
from mlx_distributed.errors import printable

KINDS = {
    "refused": "changes what is trained, and is not here",
    "no counterpart": "no counterpart here",
    "not needed": "not needed here",
}


def report(translation: Translation, name: str) -> str:
    """Every key of the file `name`, by what became of it."""
    counts = ", ".join(f"{len(translation.of(kind))} {kind}" for kind in ("mapped", *KINDS))
    num_keys = sum(not finding.default for finding in translation.findings)
    lines = [f"{name} is for {translation.tool.title} and has {num_keys} keys: {counts}"]
    lines += _mapped("mapped", translation.of("mapped"))
    lines += _mapped(
        f"defaults of {translation.tool.title}, written out", [each for each in translation.findings if each.default]
    )
    implied = [ours for ours, source in translation.sources.items() if source == f"as {translation.tool.title} does"]
    lines += [f"set as {translation.tool.title} does"] if implied else []
    lines += [f"  {ours}: {shown(translation.values[ours])}" for ours in implied]
    for kind, title in KINDS.items():
        lines += [title] if translation.of(kind) else []
        lines += [f"  {line}" for line in _by_reason(translation.of(kind))]
    return "\n".join(map(printable, lines))


def _mapped(title: str, findings: list[Finding]) -> Iterator[str]:
    if findings:
        yield title
    for finding in findings:
        words = f" ({finding.fate.words})" if finding.fate.words else ""
        yield f"  {_written(finding)} -> {_ours(finding)}{words}"


def _ours(finding: Finding) -> str:
    return ", ".join(f"{key}: {shown(value)}" for key, value in finding.fate.values.items())


def _written(finding: Finding) -> str:
    return f"{finding.key}: {shown(finding.value)}"


def _by_reason(findings: list[Finding]) -> Iterator[str]:
    """Keys of one reason on one line."""
    reasons: dict[str, list[Finding]] = {}
    for finding in findings:
        instead = f"; set instead: {_ours(finding)}" if finding.fate.values else ""
        reasons.setdefault(finding.fate.words + instead, []).append(finding)
    for reason, together in reasons.items():
        yield f"{', '.join(map(_written, together))}: {reason}"


def to_text(translation: Translation, source: str) -> str:
    """Our YAML, in the order of the schema, with the key that each line comes from."""
    lines = [f"# Imported from {printable(source)}, a configuration of {translation.tool.title}."]
    for kind in ("refused", "no counterpart"):
        found = translation.of(kind)
        if found:
            lines.append(f"# {KINDS[kind].capitalize()}:")
            lines += [f"#   {printable(line)}" for line in _by_reason(found)]
    nested = _nested(translation)
    for name in _in_order(Config, nested):
        value = nested[name]
        lines += ["", *(_section(name, value) if isinstance(value, dict) else [_line("", name, value)])]
    return "\n".join(lines) + "\n"


def _in_order(kind: type[Any], found: Collection[str]) -> list[str]:
    return [field.name for field in fields(kind) if field.name in found]


def _nested(translation: Translation) -> dict[str, Any]:
    """By section and key: the value with its comment. Entries of lists are put together."""
    nested: dict[str, Any] = {}
    for ours, value in translation.values.items():
        section, _, rest = ours.partition(".")
        comment = printable(translation.sources[ours])
        if not rest:
            nested[section] = (value, comment)
            continue
        key, _, entry = rest.partition(".")
        keys = nested.setdefault(section, {})
        index, _, inner = entry.partition(".")
        if inner:
            keys.setdefault(key, {}).setdefault(int(index), {})[inner] = value
        else:
            keys[key] = ({entry: value} if entry else value, comment)
    return nested


def _section(name: str, keys: dict[str, Any]) -> Iterator[str]:
    yield f"{name}:"
    for key in _in_order(type(getattr(Config(), name)), keys):
        value = keys[key]
        if isinstance(value, dict):
            yield f"  {key}:"
            for _, entry in sorted(value.items()):
                yield f"    - {to_inline({name: entry[name] for name in _in_order(SourceConfig, entry)})}"
        else:
            yield _line("  ", key, value)


def _line(indent: str, key: str, value: tuple[Any, str]) -> str:
    return f"{indent}{key}: {to_inline(value[0])}  # {value[1]}"
