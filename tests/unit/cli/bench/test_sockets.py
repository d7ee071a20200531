"""The control with ranks in threads of one process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import numpy as np
import pytest

from mlx_distributed.cli.bench.measure import canonical_sum, check_sum, values_of
from mlx_distributed.cli.bench.sockets import SocketMesh, sockets_side
from mlx_distributed.errors import CommError

T = TypeVar("T")


def on_all(num_ranks: int, body: Callable[[SocketMesh], T]) -> list[T]:
    """What each rank of a connected group gave."""
    with ExitStack() as stack, ThreadPoolExecutor(num_ranks) as pool:
        meshes = [stack.enter_context(closing(SocketMesh(rank, num_ranks))) for rank in range(num_ranks)]
        addresses = [mesh.address for mesh in meshes]
        list(pool.map(lambda mesh: mesh.connect(addresses), meshes))
        return list(pool.map(body, meshes))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("num_elements", [1, 5, 1 << 14, 100_003, 2_000_001])
def test_every_sum_is_right(num_ranks: int, num_elements: int) -> None:
    def body(mesh: SocketMesh) -> bytes:
        side = sockets_side(mesh)
        reduce = side.prepare(values_of(mesh.rank, num_elements))
        for _ in range(3):
            check_sum(side, np.concatenate(reduce()), canonical_sum(num_ranks, num_elements), mesh.rank)
        return reduce()[0].tobytes()

    first, *others = on_all(num_ranks, body)
    assert others == [first] * (num_ranks - 1)


def test_a_peer_that_leaves_is_named() -> None:
    def body(mesh: SocketMesh) -> str:
        if mesh.rank == 1:
            mesh.close()
            return ""
        with pytest.raises(CommError) as failed:
            mesh.all_reduce(np.zeros(10, np.float32), np.zeros(10, np.float32))
        return str(failed.value)

    error, _ = on_all(2, body)
    assert "rank 1" in error
    assert "has closed its connection" in error


def test_a_peer_that_is_not_there() -> None:
    with socket.socket() as taken, closing(SocketMesh(0, 2)) as mesh:
        taken.bind(("127.0.0.1", 0))  # Nobody listens there.
        with pytest.raises(CommError, match="a connection of sockets"):
            mesh.connect([mesh.address, f"127.0.0.1:{taken.getsockname()[1]}"])
