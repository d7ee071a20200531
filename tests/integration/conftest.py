from __future__ import annotations

from pathlib import Path

import pytest
from support import train_all, write_workspace


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its data and models. Tests leave it as it is and write elsewhere."""
    return write_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of `config` that nothing happened to. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    train_all(config, {folder: []})
    return folder


@pytest.fixture(scope="session")
def tied(config: Path) -> Path:
    """A model with tied embeddings."""
    return config.parent / "tied"
