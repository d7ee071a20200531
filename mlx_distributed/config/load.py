"""A YAML file and `section.key=value` overrides in, a `Config` out, or one ConfigError that lists every problem.

The file is kept as YAML nodes, which know the line they stand on, until each value is converted by the type hint of its
field. An override replaces a node, so that file and command line are read by the same code.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mlx_distributed.config.checks import check, listed
from mlx_distributed.config.names import canonical, rename_aliases, unknown_key
from mlx_distributed.config.nodes import (
    COMMAND_LINE,
    SCALARS,
    TAG,
    Loader,
    WrongValue,
    beginning,
    compose,
    construct,
    expand_sources,
    is_null,
    replaced,
    show,
)
from mlx_distributed.config.schema import Config
from mlx_distributed.errors import ConfigError

_LOCAL = re.compile(r"(?:\./|\.\./|/|~).*|.*\.(?:json|jsonl|parquet)", re.S)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, with `overrides` such as `train.epochs=3` laid over it.

    Paths in the file are relative to its folder, paths in an override to the current one. `output_dir`, and every path
    that exists, come back absolute.

    Raises:
        ConfigError: the file cannot be read, or something in it or in the overrides cannot be used. One line per
            problem, `file:line: key=value: rule; what works`, in the order of the file.
    """
    return parse_config(_read_text(path), path, overrides)


def parse_config(text: str, path: Path, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, for the `text` of a file that would stand at `path`."""
    reader = _Reader(path)
    with _refusing(path, text):
        root = _mapping(text, path)
        rename_aliases(root)
        for override in overrides:
            root = reader.override(root, override)
        expand_sources(root)
        reader.locate(root, "")
        config = reader.section(root, Config, "")
    reader.check(config)
    reader.refuse_problems()
    return replace(config, output_dir=_absolute(path.parent, str(config.output_dir)))


def read_mapping(path: Path) -> yaml.MappingNode:
    """The nodes of any YAML file that holds a mapping, `<<` resolved; keys are text, and none stands twice.

    Raises:
        ConfigError: it is no such file.
    """
    text = _read_text(path)
    reader = _Reader(path)
    with _refusing(path, text):
        root = _mapping(text, path)
        reader.locate(root, "")
        construct(root)  # nothing in it has a tag of which there is no plain value
    reader.refuse_problems()
    return root


def _mapping(text: str, path: Path) -> yaml.MappingNode:
    root = compose(text, str(path))
    if isinstance(root, yaml.MappingNode):
        return root
    found = "the file is empty" if root is None or is_null(root) else f"the top level is {show(root)}"
    rule = f"{found}; it must be a mapping of sections such as model, data and train"
    raise _refusal(path, [f"{path}:{1 if root is None else root.start_mark.line + 1}: {rule}"])


@contextmanager
def _refusing(path: Path, text: str) -> Iterator[None]:
    """Refuse what is no YAML, or too much of it."""
    try:
        yield
    except RecursionError as error:
        raise _refusal(path, [f"{path}:1: the file refers to itself or is nested too deeply"]) from error
    except yaml.YAMLError as error:
        raise _refusal(path, [f"{_where(error, path, text)}: {_words(error)}"]) from error


def _refusal(path: Path, lines: Sequence[str]) -> ConfigError:
    count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
    return ConfigError("\n".join([f"The configuration {path} has {count}; nothing was started.", *lines]))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        works = "give the path of a YAML file"
        raise _refusal(path, [f"{path}: {error.strerror} (looked at {path.absolute()}); {works}"]) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refusal(path, [f"{path}:{line}: this is not UTF-8 text; save the file as UTF-8"]) from error


def _where(error: yaml.YAMLError, path: Path, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark and mark.name == COMMAND_LINE:
        return COMMAND_LINE
    line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
    return f"{path}:{line + 1}"


def _words(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    known = [getattr(error, name, None) for name in ("context", "problem", "reason")]
    reason = ", ".join(filter(None, known))
    column = f" at column {mark.column + 1}" if mark else ""
    return f"not valid YAML: {reason}{column}; look at the indentation, the colons and the quotes there"


class _Reader:
    """Turns nodes into a `Config`, and notes every problem on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[tuple[int, str]] = []
        """Line (the command line comes last) and text."""
        self.given: dict[str, tuple[yaml.Mark, yaml.Node]] = {}
        """Where each dotted key stands, and its value."""
        self.broken: set[str] = set()
        """Keys whose value is unknown because of a problem: no further rule is applied to them."""

    def report(self, mark: yaml.Mark, label: str, rule: str) -> None:
        if mark.name == COMMAND_LINE:
            self.problems.append((sys.maxsize, f"{COMMAND_LINE}: {label}: {rule}"))
        else:
            self.problems.append((mark.line, f"{self.path}:{mark.line + 1}: {label}: {rule}"))

    def refuse_problems(self) -> None:
        if self.problems:
            raise _refusal(self.path, [line for _, line in sorted(self.problems, key=lambda problem: problem[0])])

    def wrong(self, error: WrongValue) -> None:
        self.broken.add(error.key)
        self.report(error.node.start_mark, f"{error.key}={show(error.node)}", error.rule)

    def override(self, root: yaml.MappingNode, text: str) -> yaml.MappingNode:
        """`root` with one `section.key=value` laid over it."""
        start = beginning(COMMAND_LINE)
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            self.report(start, text, "is not of the form section.key=value; write train.epochs=3, for example")
            return root
        try:
            node = compose(value, COMMAND_LINE) or yaml.ScalarNode(TAG + "null", "", start, start)
            expand_sources(root)
            return replaced(root, canonical(names), node, "")  # type: ignore[return-value]  # a mapping stays a mapping
        except yaml.YAMLError as error:
            self.report(start, text, _words(error))
        except WrongValue as error:
            self.wrong(error)
        return root

    def locate(self, node: yaml.Node, key: str) -> None:
        """Fill `given` from `node`, which stands at `key`; report keys that stand twice; resolve `<<`."""
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.given[f"{key}.{index}"] = item.start_mark, item
                self.locate(item, f"{key}.{index}")
        if not isinstance(node, yaml.MappingNode):
            return
        first: dict[str, int] = {}
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "found a key that is not text", name.start_mark)
            if name.value in first:
                label = f"{_join(key, name.value)}={show(child)}"
                self.report(name.start_mark, label, f"the key stands on line {first[name.value]} too; keep one of them")
            first.setdefault(name.value, name.start_mark.line + 1)
        Loader("").flatten_mapping(node)
        for name, child in node.value:
            self.given[_join(key, name.value)] = name.start_mark, child
            self.locate(child, _join(key, name.value))

    def section(self, node: yaml.Node, kind: type[Any], key: str) -> Any:
        """An instance of the dataclass `kind`, with the default for whatever is wrong, which is reported."""
        if is_null(node):  # a section whose keys are all commented out
            return kind()
        if not isinstance(node, yaml.MappingNode):
            raise WrongValue(node, key, _rule(node, kind))
        hints = get_type_hints(kind)
        values: dict[str, Any] = {}
        for name, child in node.value:
            dotted = _join(key, name.value)
            if name.value not in hints:
                message, meant = unknown_key(dotted, list(hints))
                self.broken.add(dotted)
                if meant is not None and meant not in self.given:
                    self.broken.add(meant)
                self.report(name.start_mark, f"{dotted}={show(child)}", message)
                continue
            try:
                values[name.value] = self.value(child, hints[name.value], dotted)
                if isinstance(values[name.value], str) and _is_path(dotted):
                    values[name.value] = self.place(child, dotted)
            except WrongValue as error:
                self.wrong(error)
        return kind(**values)

    def value(self, node: yaml.Node, hint: Any, key: str) -> Any:
        """What `node` says, as the type `hint`. Strict: a bool is no number, and text is not parsed.

        Raises:
            WrongValue: it is something else.
        """
        origin, args = get_origin(hint), get_args(hint)
        if is_dataclass(hint):
            return self.section(node, hint, key)  # type: ignore[arg-type]  # a class, as every hint
        if origin in (Union, types.UnionType):
            for member in args:
                try:
                    return self.value(node, member, key)
                except WrongValue:
                    continue
        elif origin is tuple:
            items = node.value if isinstance(node, yaml.SequenceNode) else None
            if (args[0] is str or get_origin(args[0]) is Literal) and node.tag == TAG + "str":
                items = [node]
            variadic = args[-1] is Ellipsis
            if items is not None and (variadic or len(items) == len(args)):
                kinds = [args[0]] * len(items) if variadic else args
                return tuple(
                    self.value(item, kind, f"{key}.{index}")
                    for index, (item, kind) in enumerate(zip(items, kinds, strict=True))
                )
        elif origin is dict and isinstance(node, yaml.MappingNode):
            return {
                self.value(name, args[0], _join(key, name.value)): self.value(child, args[1], _join(key, name.value))
                for name, child in node.value
            }
        elif hint is Any:
            return construct(node)
        elif isinstance(node, yaml.ScalarNode):
            value = construct(node)
            if origin is Literal and value in args:
                return value
            if hint is float and type(value) in (int, float):
                # `check` refuses infinity; float() of a longer int would raise.
                return float(value) if abs(value) <= sys.float_info.max else math.inf
            if hint is Path and isinstance(value, str) and value:
                return _absolute(self.base(node), value)
            if type(value) is hint:  # bool is a subclass of int; NoneType is among the members of an optional
                return value
        raise WrongValue(node, key, _rule(node, hint))

    def base(self, node: yaml.Node) -> Path:
        """The folder that a path in `node` is relative to."""
        return Path.cwd() if node.start_mark.name == COMMAND_LINE else self.path.parent

    def place(self, node: yaml.ScalarNode, key: str) -> str:
        """The absolute path that `node` names, or its text where that is a name on the Hugging Face hub or a template.

        Raises:
            WrongValue: it can only be a path, and nothing is there.
        """
        text: str = node.value
        path = _absolute(self.base(node), text)
        try:
            found = bool(text) and path.exists()
        except OSError:  # a template is too long for a file name
            found = False
        if found:
            return str(path)
        template = key == "data.chat_template"
        if (template and "{" not in text) or (not template and _LOCAL.fullmatch(text)):
            relative = "the current folder" if node.start_mark.name == COMMAND_LINE else "the folder of the YAML file"
            works = "give Jinja text or a file with it" if template else "give the path of a file or folder"
            raise WrongValue(node, key, f"there is nothing at {path} (paths are relative to {relative}); {works}")
        return text

    def check(self, config: Config) -> None:
        """Report the rules that `config` breaks, each at the first of its keys that was written."""
        for problem in check(config):
            keys = (problem.key, *problem.others)
            if any(_overlap(key, broken) for key in keys for broken in self.broken):
                continue
            written = next((key for key in keys if key in self.given), problem.key)
            while written and written not in self.given:
                written = written.rpartition(".")[0]
            mark = self.given[written][0] if written else beginning(str(self.path))
            self.report(mark, problem.key + self.shown(problem.key), problem.message)

    def shown(self, key: str) -> str:
        if key in self.given:
            return f"={show(self.given[key][1])}"
        default: Any = Config()
        for name in key.split("."):
            default = getattr(default, name, None)
        return "" if default in (None, (), "") else f"={default} (the default)"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _is_path(key: str) -> bool:
    return re.fullmatch(r"model\.path|data\.chat_template|data\.(?:train|validation)\.\d+\.path", key) is not None


def _absolute(folder: Path, text: str) -> Path:
    """`text` in `folder`, absolute. A link itself is not followed: the Hugging Face cache links to nameless files."""
    try:
        path = folder / Path(text).expanduser()
        return path.parent.resolve() / path.name
    except RuntimeError:  # no such user, or links in a circle
        return folder.absolute() / text


def _rule(node: yaml.Node, hint: Any) -> str:
    """What a value of the type `hint` must be and, where it can be told, what to write instead of `node`."""
    rule = f"must be {_describe(hint)}"
    if not isinstance(node, yaml.ScalarNode):
        return rule
    if is_null(node):
        return f"{rule}; leave the key out for the default"
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    text, value = node.value, construct(node)
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    switches = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
    if near := get_close_matches(text, choices, 1):
        return f"{rule}; did you mean {near[0]}?"
    if (str in members or Path in members) and not isinstance(value, str):
        return f'{rule}; write "{text}" in quotes'
    if bool in members and text.lower() in switches:
        return f"{rule}; write {switches[text.lower()]}"
    if int in members and isinstance(value, float) and value.is_integer():
        return f"{rule}; write {int(value)}"
    number = any(SCALARS[kind].match(text) for kind in ("int", "float"))
    if isinstance(value, str) and number and (int in members or float in members):
        return f"{rule}; write it without quotes"
    return rule


def _describe(hint: Any) -> str:
    args = get_args(hint)
    if is_dataclass(hint):
        return f"a section; its keys are {', '.join(field.name for field in fields(hint))}"
    if get_origin(hint) in (Union, types.UnionType):
        choices = [
            choice for arg in args for choice in (get_args(arg) if get_origin(arg) is Literal else [_describe(arg)])
        ]
        return listed(choices)
    if get_origin(hint) is Literal:
        return listed(args)
    if get_origin(hint) is dict:
        return "a mapping of text to text" if args[1] is str else "a mapping"
    if get_origin(hint) is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        if get_origin(args[0]) is Literal:
            return f"a list of any of {', '.join(get_args(args[0]))}"
        return f"a list of {count}{ {float: 'numbers', str: 'names'}.get(args[0], 'sources') }"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(hint, "null")
