from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distributed.testing import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3 folder with tied embeddings. Tests leave it as it is."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")
