"""What is compared: ways to sum one array over all ranks, each ready to be called again and again."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_distributed.cli.bench.options import ELEMENT_BYTES
from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BUCKET_BYTES, make_layout, to_buckets
from mlx_distributed.comm.native import NativeComm

HOST = "127.0.0.1"

Reduce = Callable[[], Sequence[np.ndarray]]
"""Sums over all ranks; gives the result in pieces, as host arrays."""

_ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-10, "int8": 2.0**-7, "int4": 2.0**-3}
"""Twice what rounding one value can leave out, as a share of the largest one."""


@dataclass(frozen=True)
class Side:
    """One of the ways."""

    backend: str
    wire: str
    tolerance: float
    """Largest error of an element, where ranks put in values of at most 1; 0: the same bits as the canonical sum."""
    prepare: Callable[[np.ndarray], Reduce]
    """Takes this rank's values, flat float32, into the memory in which they are to be when the clock starts."""


def grpc_side(comm: Communicator, wire: str, backend: str = "grpc") -> Side:
    """Ours, as it takes gradients: in buckets."""
    length = BUCKET_BYTES // ELEMENT_BYTES
    return Side(backend, wire, comm.size * _ROUNDING[wire], lambda values: _over(comm, values, length, wire))


def ring_side(ring: NativeComm) -> Side:
    """MLX's ring, which takes one array at its best."""
    return Side("ring", "fp32", order_tolerance(ring.size), lambda values: _over(ring, values, values.size, "fp32"))


@contextmanager
def free_address(host: str = HOST) -> Iterator[str]:
    """An address of this machine that nobody else gets within the `with`, and that nobody can connect to."""
    bare = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET) as sock:
        sock.bind((bare, 0))
        yield f"{host}:{sock.getsockname()[1]}"


def join_ring(rank: int, addresses: Sequence[str]) -> NativeComm:
    """Join MLX's ring. Until all ranks have, no other thread of this process runs: MLX does not let them.

    Args:
        addresses: of all ranks, as host:port.

    Raises:
        CommError: the ring could not be made.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hosts:
        json.dump([[address] for address in addresses], hosts)
        hosts.flush()
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=hosts.name)
        return NativeComm("ring")


def order_tolerance(size: int) -> float:
    """How far sums of values of at most 1 that were added in different orders are from each other, at most."""
    return size**2 * 2.0**-23


def _over(comm: Communicator, values: np.ndarray, length: int, wire: str) -> Reduce:
    pieces = np.split(values, range(length, values.size, length))
    arrays = {f"{index:04}": mx.array(piece) for index, piece in enumerate(pieces)}
    mx.eval(arrays)
    layout = make_layout(arrays, wire=wire)
    own = [{(comm.rank, comm.rank + 1): bucket} for bucket in to_buckets(layout, arrays)]

    def reduce() -> Sequence[np.ndarray]:
        summed = comm.all_reduce(layout, comm.size, own, "the benchmark")
        return [np.asarray(array) for bucket in summed for array in bucket]  # evaluates

    return reduce
