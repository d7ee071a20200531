from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "mlx_distributed"


def read_tree(readme: str) -> list[str]:
    """The paths in the last fenced block: two spaces of indentation a level, a folder ends in a slash."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert blocks, "the README has no fenced block"
    folders: list[str] = []
    paths = []
    for line in blocks[-1].splitlines():
        if line.strip():
            name = line.split()[0]
            level = (len(line) - len(line.lstrip())) // 2
            folders[level:] = [name]
            paths.append("".join(folders))
    return paths


def package_files() -> set[str]:
    """Every module of the package but generated ones and files that only mark a folder as a package."""
    files = [path for path in (ROOT / PACKAGE).rglob("*.py") if "_pb" not in path.parts and path.stat().st_size]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_a_tree_is_read_as_paths() -> None:
    text = "```\nfirst block\n```\n\n```text\na/\n  b.py    what it is\n  c/      words\n    d.py  e.py\nf.md\n```\n"
    assert read_tree(text) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "f.md"]


def test_a_readme_without_a_tree_is_refused() -> None:
    with pytest.raises(AssertionError, match="no fenced block"):
        read_tree("# Title\n")


def test_the_tree_in_the_readme_is_complete_and_true() -> None:
    listed = read_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(set(listed)) == sorted(listed), "a path stands in the tree twice"
    assert package_files() - set(listed) == set(), "missing in the tree"
    assert [path for path in listed if not (ROOT / path).exists()] == [], "in the tree, but not there"
