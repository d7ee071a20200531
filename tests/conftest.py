"""Settings of every test, made before MLX is imported; worker processes inherit the environment."""

import os

import pytest

# On Linux MLX compiles kernels by calling g++ at run time: seconds per kernel, and the same bits.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
# Nothing may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True, scope="session")
def cpu() -> None:
    """Equal bits are promised on the CPU: on a Mac's GPU, MLX adds the gradient of an embedding with atomics."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
