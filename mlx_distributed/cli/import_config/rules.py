"""What becomes of a key of another program: the pieces that the tables of the programs are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mlx_distributed.config.dump import to_inline
from mlx_distributed.config.nodes import construct

Kind = Literal["mapped", "not needed", "no counterpart", "refused"]
"""`refused` is without a counterpart too, and what is trained would be something else without it."""
OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", "no", "none", [], {})

YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}
"""Unquoted words that the other programs read so, and we do not."""


class Unusable(ValueError):
    """A value that cannot be what its key needs."""


@dataclass(frozen=True)
class Theirs:
    """The configuration that is imported, as a whole."""

    values: Mapping[str, Any]
    """With the defaults of the other program for keys that are not there."""
    num_devices: int = 1
    folder: Path = Path()
    """Of their file."""
    base: Path = Path()
    """Of ours, which its paths are relative to."""

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def on(self, key: str) -> bool:
        return not off(self.get(key))

    def find(self, text: str) -> str | None:
        """A file or folder, seen from the current folder or theirs, as our YAML names it."""
        found = locate(text, Path.cwd(), self.folder)
        return None if found is None else relative(found, self.base)

    def path(self, text: str) -> str:
        """The same, or the text itself where nothing is there, as for a name on the hub."""
        return self.find(text) or text


@dataclass(frozen=True)
class Place:
    """Where a value stands."""

    key: str
    """Dotted, with numbers for the entries of lists: `datasets.0.path`."""
    theirs: Theirs

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    def fill(self, target: str) -> str:
        """Our key, with the entry of this place for its `*`."""
        return target.replace("*", self.index)

    @property
    def index(self) -> str:
        return next((part for part in self.key.split(".") if part.isdecimal()), "0")


@dataclass(frozen=True)
class Fate:
    """What becomes of a value."""

    kind: Kind
    words: str = ""
    """Why, or what was calculated."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What is set here, by dotted key. Something can be, also in place of what has no counterpart."""


@dataclass(frozen=True)
class Rule:
    """For one key, or with `covers` for all that stands beneath it too."""

    decide: Callable[[Any, Place], Fate]
    """Is not asked about null. May raise `Unusable`."""
    targets: tuple[str, ...] = ()
    """Every key of ours that it may set; `*` stands for an entry of a list."""
    covers: bool = False


Rules = Mapping[str, Rule]


@dataclass(frozen=True)
class Tool:
    """Another program."""

    name: str
    """As `--from` takes it."""
    title: str
    rules: Rules
    """By dotted key, with `*` for the entries of lists."""
    defaults: Mapping[str, Any]
    """Its values of keys that are left out, where ours are others."""
    implied: Callable[[Theirs], Mapping[str, Any]]
    """What is a setting here, and there follows from others or cannot be changed."""


def plain(node: yaml.Node) -> Any:
    """The value of `node`, with its keys as the text that was written."""
    if isinstance(node, yaml.MappingNode):
        return {name.value: plain(child) for name, child in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith(":str"):
        return YAML_1_1.get(node.value.lower(), node.value)
    return construct(node)


def locate(text: str, *folders: Path) -> Path | None:
    """The file or folder `text`, in the first of the `folders` that has it."""
    try:
        return next((folder / text for folder in folders if (folder / text).exists()), None)
    except OSError:  # a template is too long for a file name
        return None


def relative(path: Path, base: Path) -> str:
    """`path` as a file of the folder `base` says it: relative where it lies beneath, else absolute."""
    path, base = path.absolute(), base.absolute()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def shown(value: Any) -> str:
    """For a message, on one line."""
    line = to_inline(value)
    return line if len(line) <= 60 else f"{line[:57]}..."


def off(value: Any) -> bool:
    return any(value == each and type(value) is type(each) for each in OFF)


def mapped(values: Mapping[str, Any], words: str = "") -> Fate:
    return Fate("mapped", words, values)


def to(target: str, convert: Callable[[Any], Any], words: str = "") -> Rule:
    """The key `target` of ours means the same."""
    return Rule(lambda value, place: mapped({place.fill(target): convert(value)}, words), (target,))


def to_path(target: str) -> Rule:
    return Rule(lambda value, place: mapped({place.fill(target): place.theirs.path(text(value))}), (target,))


def to_output(value: Any, place: Place) -> Fate:
    """`output_dir`, which there is relative to the current folder."""
    return mapped({"output_dir": relative(Path.cwd() / text(value), place.theirs.base)})


def unneeded(why: str) -> Rule:
    return Rule(lambda value, place: Fate("not needed", why), covers=True)


def missing(why: str) -> Rule:
    """A feature that is not here; nothing is lost where it is switched off."""
    return Rule(lambda value, place: _off() if off(value) else Fate("no counterpart", why), covers=True)


def refuse(why: str) -> Rule:
    """As `missing`, and without it something else would be trained."""
    return Rule(lambda value, place: _off() if off(value) else Fate("refused", why), covers=True)


def instead(why: str, values: Mapping[str, Any]) -> Rule:
    """As `missing`, and `values` take its place."""
    return Rule(lambda value, place: Fate("no counterpart", why, values), tuple(values))


def _off() -> Fate:
    return Fate("not needed", "switched off")


def choose(target: str, ours: Mapping[Any, Any], otherwise: Rule) -> Rule:
    """The value of ours by theirs; `otherwise` decides where there is none."""

    def decide(value: Any, place: Place) -> Fate:
        known = isinstance(value, bool | str | int) and value in ours
        return mapped({place.fill(target): ours[value]}) if known else otherwise.decide(value, place)

    return Rule(decide, (target, *otherwise.targets))


def each(keys: str, rule: Rule) -> dict[str, Rule]:
    """The same rule for several keys, which are separated by spaces."""
    return dict.fromkeys(keys.split(), rule)


def only_if(holds: Callable[[Theirs], bool], rule: Rule, why: str) -> Rule:
    """`rule` where it `holds`; elsewhere the key means nothing, and `why` says so."""
    return Rule(
        lambda value, place: rule.decide(value, place) if holds(place.theirs) else Fate("not needed", why),
        rule.targets,
        rule.covers,
    )


def number(value: Any) -> float:
    """Also of text, such as `1_000`, which YAML 1.1 takes for a number."""
    if not isinstance(value, bool):
        try:
            if math.isfinite(found := float(value)):
                return found
        except (TypeError, ValueError, OverflowError):
            pass
    raise Unusable("is not a number")


def whole(value: Any) -> int:
    if not (found := number(value)).is_integer():
        raise Unusable("is not a whole number")
    return int(found)


def count(value: Any) -> int:
    if (found := whole(value)) < 1:
        raise Unusable("must be at least 1")
    return found


def switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Unusable("is neither true nor false")


def text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise Unusable("is not text")


def names(value: Any) -> list[str]:
    """A list, or text with commas."""
    found = value.split(",") if isinstance(value, str) else value
    if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return [name.strip() for name in found]
    raise Unusable("is not a list of names")
