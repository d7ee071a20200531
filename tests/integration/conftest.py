from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tied(config: Path) -> Path:
    """A model with tied embeddings."""
    return config.parent / "tied"
