"""Joining a group: which communicator serves how many ranks is decided here, and nowhere above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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

    Raises:
        CommError: the address is in use, or a peer did not come or was refused.
    """
    if size == 1:
        exchange("")
        return LocalComm()
    comm = GrpcComm(rank, size, run_id, timeout_s=timeout_s, listen=listen, bandwidths=bandwidths, identity=identity)
    try:
        comm.connect(exchange(comm.address))
    except BaseException as error:
        comm.close(error)
        raise
    return comm
