"""Settings of every test, made before MLX is imported; worker processes inherit the environment. And shared runs."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# On Linux MLX compiles kernels by calling g++ at run time: seconds per kernel, and the same bits.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
# Nothing may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_collection_finish() -> None:
    """What the imports have made stays; to go through it for garbage again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cpu() -> None:
    """Equal bits are promised on the CPU: on a Mac's GPU, MLX adds the gradient of an embedding with atomics."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its data and models. Tests leave it as it is and write elsewhere."""
    from support import write_workspace

    return write_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of `config` that nothing happened to. Tests leave it as it is."""
    from support import train_all

    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    train_all(config, {folder: []})
    return folder
