from __future__ import annotations

from pathlib import Path

import pytest
from support import write_workspace


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its data and models. Tests leave it as it is and write elsewhere."""
    return write_workspace(tmp_path_factory.mktemp("workspace"))
