"""Joining a group: which communicator serves how many ranks is decided here, and nowhere above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.grpc_comm import GrpcComm

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity


def join_group(
    rank: int,
    size: int,
    run_id: str,
    timeout_s: float,
    listen: str,
    exchange: Callable[[str], Sequence[str]],
    bandwidths: Sequence[float] | None = None,
    identity: Identity | None = None,
    generation: int = 0,
) -> Communicator:
    """Join the group of a run.

    Args:
        rank: of this worker.
        size: of the group.
        run_id: secret of the run.
        timeout_s: a peer that is waited for and sends nothing for so long is given up.
        listen: address to listen on; port 0 takes a free one.
        exchange: told the address that this rank listens on, gives those of all ranks.
        bandwidths: of each rank's link, in any unit; None means that they are alike.
        identity: of the run, for TLS; None for ranks on one machine.
        generation: of the group; stands in its errors.

    Raises:
        CommError: the address is in use, or a peer did not come or was refused.
    """
    if size == 1:
        exchange("")
        return LocalComm()
    comm = GrpcComm(rank, size, run_id, generation, timeout_s, listen=listen, bandwidths=bandwidths, identity=identity)
    try:
        comm.connect(exchange(comm.address))
    except BaseException as error:
        comm.close(error)
        raise
    return comm


def join_part(
    comm: Communicator,
    ranks: Sequence[int],
    run_id: str,
    timeout_s: float,
    generation: int,
    listen: str = "127.0.0.1:0",
    identity: Identity | None = None,
) -> Communicator:
    """Join a group of some of the ranks of another group; called on all ranks of that, each with its own part.

    Args:
        comm: whose ranks they are.
        ranks: of the part, in the order of their ranks in it; this rank is among them.
        run_id, timeout_s, generation, listen, identity: as for `join_group`.

    Raises:
        CommError: a peer did not come, or was refused.
    """

    def exchange(address: str) -> list[str]:
        mine = mx.array(np.frombuffer(address.encode(), np.uint8))
        gathered = comm.all_gather(mine, "addresses")
        addresses = [np.asarray(array).tobytes().decode() for array in gathered]
        return [addresses[rank] for rank in ranks]

    rank, size = ranks.index(comm.rank), len(ranks)
    return join_group(rank, size, run_id, timeout_s, listen, exchange, identity=identity, generation=generation)
