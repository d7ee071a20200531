"""PyTorch's Gloo, where it is installed. PyTorch is no dependency of ours, and it is imported nowhere else."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from mlx_distributed.cli.bench.sides import Reduce, Side, order_tolerance
from mlx_distributed.errors import CommError


def import_torch() -> tuple[Any, str]:
    """PyTorch with Gloo; or None, and the reason."""
    try:
        torch = importlib.import_module("torch")
        distributed = importlib.import_module("torch.distributed")
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        return None, f"PyTorch cannot be imported ({error})"
    if not (distributed.is_available() and distributed.is_gloo_available()):
        return None, "this PyTorch was built without Gloo"
    return torch, ""


def join_gloo(torch: Any, rank: int, size: int, address: str) -> None:
    """Join a group of Gloo, over the loopback interface unless GLOO_SOCKET_IFNAME names another one.

    Args:
        address: host:port where rank 0 introduces the others to each other.

    Raises:
        CommError: the group could not be made.
    """
    # Left to itself it listens at the address of the machine's name, if there is one.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    at, timeout = f"tcp://{address}", timedelta(seconds=60)
    join = torch.distributed.init_process_group
    _guard(lambda: join("gloo", init_method=at, rank=rank, world_size=size, timeout=timeout))


def gloo_side(torch: Any) -> Side:
    """PyTorch's Gloo, whose group this process has joined."""

    def prepare(values: np.ndarray) -> Reduce:
        # It sums in place: only the first sum is that of the values. The next ones, up to infinity, take as long.
        summed = torch.from_numpy(values.copy())

        def reduce() -> Sequence[np.ndarray]:
            _guard(lambda: torch.distributed.all_reduce(summed))
            return [summed.numpy()]

        return reduce

    return Side("gloo", "fp32", order_tolerance(torch.distributed.get_world_size()), prepare)


def _guard(call: Callable[[], object]) -> None:
    """A failure of Gloo as one of ours."""
    try:
        call()
    except RuntimeError as error:
        raise CommError("a call of Gloo", None, 0, 0.0, str(error)) from None
