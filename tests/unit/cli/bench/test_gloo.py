from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mlx_distributed.cli.bench.gloo import import_torch

WITHOUT_GLOO = "def is_available():\n    return True\n\n\ndef is_gloo_available():\n    return False\n"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"__init__.py": "raise ImportError('no such thing')"}, "PyTorch cannot be imported (no such thing)"),
        ({"__init__.py": "raise OSError('libtorch.so: too old')"}, "PyTorch cannot be imported (libtorch.so: too old)"),
        ({"__init__.py": "", "distributed.py": WITHOUT_GLOO}, "this PyTorch was built without Gloo"),
    ],
)
def test_a_pytorch_that_does_not_serve(
    files: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name which stands before any that is installed."""
    folder = tmp_path / "torch"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    for name in ("torch", "torch.distributed"):
        monkeypatch.setitem(sys.modules, name, None)  # is put back as it was
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    assert import_torch() == (None, reason)
