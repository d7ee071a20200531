"""The program of one rank: `python -m mlx_distributed.cli.bench.rank FD [--debug]`, started by `command` only."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import describe
from mlx_distributed.cli.interrupt import SIGNALS
from mlx_distributed.cli.worker import MAX_ERROR_CHARS

if TYPE_CHECKING:
    from mlx_distributed.cli.bench.sides import Side
    from mlx_distributed.comm.grpc_comm import GrpcComm

TIMEOUT_S = 60.0
"""A rank that is waited for and sends nothing for so long is given up."""
NOT_INSTALLED = "-"


def main(fd: int, debug: bool) -> int:
    """Take a job over the line, join the group, measure."""
    control = Control(socket.socket(fileno=fd))
    # There is nothing to save, and a rank inside the ring could not be told otherwise.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # What libraries print is no row.
    status, error = describe(lambda: _work(control), debug)
    if error is not None:
        control.send(error=error[:MAX_ERROR_CHARS])
    return status


def _work(control: Control) -> int:
    message = control.receive()
    if message is None:
        return 1
    # These import MLX, which takes a while, in which a signal must end this process already.
    from mlx_distributed.cli.bench.measure import measure_links, measure_reductions
    from mlx_distributed.comm.grpc_comm import GrpcComm

    rank, options = message["rank"], Options(**message["options"])

    def tell(**said: Any) -> None:
        if rank == 0:
            control.send(**said)

    comm = GrpcComm(rank, options.num_ranks, message["secret"], timeout_s=TIMEOUT_S)
    try:
        sides = _meet(comm, options, control, tell)
        if options.op == "links":
            for link in measure_links(comm, options):
                tell(link=asdict(link))
        else:
            for row in measure_reductions(comm, sides, options):
                tell(row=asdict(row))
    except BaseException as error:
        comm.close(error)
        raise
    comm.close()
    return 0


def _meet(comm: GrpcComm, options: Options, control: Control, tell: Callable[..., None]) -> list[Side]:
    """Join the group of each backend; returns what is to be compared."""
    from mlx_distributed.cli.bench.gloo import gloo_side, import_torch, join_gloo
    from mlx_distributed.cli.bench.sides import free_port, grpc_side, join_ring, ring_side

    torch, reason = import_torch() if "gloo" in options.against else (None, "")
    with free_port() as ring_port, free_port() as gloo_port:
        own = f"{comm.address} {ring_port} {gloo_port if torch else NOT_INSTALLED}"
        all_ranks = [line.split() for line in control.exchange(own)]
    addresses, ring_ports, gloo_ports = zip(*all_ranks, strict=True)

    sides = [grpc_side(comm, wire) for wire in options.wires]
    # The others before `connect`: while MLX makes its ring, no other thread of this process runs.
    if "ring" in options.against:
        sides.append(ring_side(join_ring(comm.rank, ring_ports)))
    if "gloo" in options.against:
        if NOT_INSTALLED in gloo_ports:
            tell(note=f"gloo is left out: {reason or 'another rank has no PyTorch'}")
        else:
            join_gloo(torch, comm.rank, comm.size, gloo_ports[0])
            sides.append(gloo_side(torch))
    comm.connect(addresses)
    return sides


if __name__ == "__main__":
    code = main(int(sys.argv[1]), "--debug" in sys.argv)
    sys.stderr.flush()
    # Threads of Gloo or of the transport of a lost peer must not hold up the end.
    os._exit(code)
