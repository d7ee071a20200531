"""The shape of the package, read from its imports: which room uses which, who owns a library, how long a file is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "mlx_distributed"

# A room imports from itself and from lower lines. Rooms on one line are siblings, which do not import each other.
LAYERS = (
    ("cli",),
    ("serve", "embed"),
    ("train",),
    ("parallel", "elastic"),
    ("comm",),
    ("models", "data", "tracking", "evaluate"),
    ("config", "errors", "__init__"),
)
LEVEL = {room: level for level, rooms in enumerate(reversed(LAYERS)) for room in rooms}
ALSO_ALLOWED = {("config", "errors")}
# Elastic training is given the trainer; the trainer does not know of it. `testing` is for tests alone.
NEVER = {("train", "elastic"), *((room, "testing") for room in LEVEL)}

ONLY_IN = {
    "grpc": {
        "comm/endpoint.py",
        "comm/grpc_streams.py",
        "elastic/coordinator.py",
        "elastic/membership.py",
    },
    "mlx.core.distributed": {"comm/native.py", "parallel/tensor.py"},
    "wandb": {"tracking/wandb_tracker.py"},
    "sacrebleu": {"evaluate/score.py"},
}
# Slow and large to import, and most runs need none of them.
LAZY = {"datasets", "sacrebleu", "wandb"}
# Configurations are checked where MLX cannot be installed.
PLAIN_LEVEL, PLAIN_LIBRARIES = 0, {*sys.stdlib_module_names, "yaml"}
MAX_LINES = 400


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported; `mx.distributed` counts as an import of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("mx.distributed", "mlx.core.distributed"):
            yield node.lineno, "mlx.core.distributed"


def within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def room_of(name: str) -> str:
    """The room of a dotted name in the package; what the package itself defines is in `__init__`."""
    room = name.split(".")[1]
    return room if room in LEVEL or room == "testing" else "__init__"


def problems(path: str, source: str) -> list[str]:
    """What is wrong with the imports of the file at `path` in the package."""
    tree = ast.parse(source)
    room = path.split("/")[0].removesuffix(".py")
    found = []
    if room not in LEVEL:
        found.append(f"{path}: no layer for {room}")
    for line, name in imports(tree):
        top = name.split(".")[0]
        if top == PACKAGE:
            other = room_of(name) if "." in name else "__init__"
            upward = LEVEL.get(other, 0) >= LEVEL.get(room, 0) and room != other
            if (room, other) in NEVER or (upward and (room, other) not in ALSO_ALLOWED):
                found.append(f"{path}:{line}: {room} imports {other}")
        elif not top:
            found.append(f"{path}:{line}: relative import")
        elif LEVEL.get(room) == PLAIN_LEVEL and top not in PLAIN_LIBRARIES:
            found.append(f"{path}:{line}: {room} imports {top}")
        found += [
            f"{path}:{line}: {module} outside {sorted(owners)}"
            for module, owners in ONLY_IN.items()
            if within(name, module) and path not in owners
        ]
    top_level = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    found += [
        f"{path}:{line}: {name} imported at the top"
        for line, name in imports(top_level)
        if any(within(name, module) for module in LAZY)
    ]
    return found


def files(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "_pb" not in path.parts]


@pytest.mark.parametrize("path", [path.relative_to(ROOT / PACKAGE).as_posix() for path in files(PACKAGE)])
def test_imports_go_down_only(path: str) -> None:
    if not path.startswith("testing/"):
        assert problems(path, (ROOT / PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", [PACKAGE, "tests", "scripts", "configs"])
def test_no_file_is_too_long(folder: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(folder)}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("comm/wire.py", "from mlx_distributed.train.state import TrainState"),
        ("comm/wire.py", "from mlx_distributed import train"),
        ("comm/wire.py", "def f():\n    import mlx_distributed.cli"),
        ("comm/wire.py", "from ..train import state"),
        ("comm/base.py", "import grpc"),
        ("comm/base.py", "from grpc import aio"),
        ("comm/base.py", "import mlx.core as mx\nmx.distributed.init()"),
        ("comm/base.py", "from mlx.core import distributed"),
        ("comm/base.py", "import mlx_distributed.testing"),
        ("data/plan.py", "from mlx_distributed.models import load"),
        ("parallel/mesh.py", "from mlx_distributed.elastic import loop"),
        ("train/trainer.py", "from mlx_distributed.elastic import loop"),
        ("train/trainer.py", "import wandb"),
        ("tracking/wandb_tracker.py", "import wandb"),
        ("data/sources.py", "from datasets import load_dataset"),
        ("config/load.py", "import mlx.core"),
        ("errors.py", "from mlx_distributed.config import Config"),
        ("unheard_of.py", ""),
    ],
)
def test_a_breach_is_found(path: str, source: str) -> None:
    assert problems(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli/train.py", "from mlx_distributed import __version__, train\nfrom mlx_distributed.comm import base"),
        ("comm/grpc_streams.py", "import grpc.aio\nfrom mlx_distributed.comm._pb import collective_pb2"),
        ("comm/native.py", "import mlx.core as mx\nmx.distributed.init()"),
        ("config/load.py", "import yaml\nfrom mlx_distributed.errors import ConfigError"),
        ("tracking/wandb_tracker.py", "def f():\n    import wandb"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert problems(path, source) == []
