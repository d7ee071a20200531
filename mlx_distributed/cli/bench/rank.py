"""The program of one rank: `python -m mlx_distributed.cli.bench.rank FD [--debug]`, started by `command` only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlx_distributed.cli.bench.options import Options
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import describe
from mlx_distributed.cli.interrupt import SIGNALS
from mlx_distributed.cli.worker import MAX_ERROR_CHARS

if TYPE_CHECKING:
    from mlx_distributed.cli.bench.sides import Side
    from mlx_distributed.cli.bench.sockets import SocketMesh
    from mlx_distributed.comm.grpc_comm import GrpcComm
    from mlx_distributed.comm.tls import Identity

TIMEOUT_S = 60.0
"""A rank that is waited for and sends nothing for so long is given up."""
NOT_INSTALLED = "-"
MBIT = 1e6 / 8
"""Bytes."""


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
    from mlx_distributed.cli.bench.sockets import SocketMesh
    from mlx_distributed.comm.grpc_comm import GrpcComm

    rank, options = message["rank"], Options(**message["options"])

    def tell(**said: Any) -> None:
        if rank == 0:
            control.send(**said)

    identities: list[Identity | None] = [] if options.over_network else [None]
    if message["identity"] is not None:
        from mlx_distributed.comm.tls import Identity

        identities.append(Identity(**message["identity"]))
    host, secret = message["host"], message["secret"]
    comms = [
        GrpcComm(rank, options.num_ranks, secret, timeout_s=TIMEOUT_S, listen=f"{host}:0", identity=identity)
        for identity in identities
    ]
    names = ["grpc" if identity is None else "grpc-tls" for identity in identities]
    try:
        with contextlib.closing(SocketMesh(rank, options.num_ranks)) as mesh:
            sides = _meet(comms, names, host, mesh, options, control, tell)
            if options.op == "links":
                for link in measure_links(comms[0], options):
                    tell(link=asdict(link))
            else:
                for row in measure_reductions(comms[0], sides, options):
                    tell(row=asdict(row))
    except BaseException as error:
        for comm in comms:
            comm.close(error)
        raise
    for comm in comms:
        comm.close()
    return 0


def _meet(
    comms: Sequence[GrpcComm],
    names: Sequence[str],
    host: str,
    mesh: SocketMesh,
    options: Options,
    control: Control,
    tell: Callable[..., None],
) -> list[Side]:
    """Join the group of each backend; returns what is to be compared.

    Args:
        comms: ours, one or two.
        names: of them as backends.
        host: address of this machine that the others reach.
    """
    from mlx_distributed.cli.bench.gloo import gloo_side, import_torch, join_gloo
    from mlx_distributed.cli.bench.sides import free_address, grpc_side, join_ring, ring_side
    from mlx_distributed.cli.bench.sockets import sockets_side
    from mlx_distributed.elastic.links import share_slices

    torch, reason = import_torch() if "gloo" in options.against else (None, "")
    with free_address(host) as for_ring, free_address() as for_gloo:
        others = [mesh.address, for_ring, for_gloo if torch else NOT_INSTALLED]
        own = " ".join([*others, *(comm.address for comm in comms)])
        all_ranks = [line.split() for line in control.exchange(own)]
    of_meshes, of_rings, of_gloo, *of_comms = zip(*all_ranks, strict=True)

    rank, size = comms[0].rank, comms[0].size
    sides = [grpc_side(comm, wire, name) for comm, name in zip(comms, names, strict=True) for wire in options.wires]
    # The others before `connect`: while MLX makes its ring, no other thread of this process runs.
    if "ring" in options.against:
        sides.append(ring_side(join_ring(rank, of_rings)))
    if "gloo" in options.against:
        if NOT_INSTALLED in of_gloo:
            tell(note=f"gloo is left out: {reason or 'another rank has no PyTorch'}")
        else:
            join_gloo(torch, rank, size, of_gloo[0])
            sides.append(gloo_side(torch))
    if "sockets" in options.against:
        mesh.connect(of_meshes)
        sides.append(sockets_side(mesh))
    for comm, addresses in zip(comms, of_comms, strict=True):
        comm.connect(addresses)
    if options.over_network and options.op != "links":
        speeds = share_slices([0.0] * size, comms[0])
        figures = ", ".join(f"{speeds[each].bytes_per_s / MBIT:.0f}" for each in range(size))
        tell(note=f"by rank, links give {figures} Mbit/s; slices are shared by that, as in an elastic run")
    return sides


if __name__ == "__main__":
    code = main(int(sys.argv[1]), "--debug" in sys.argv)
    sys.stderr.flush()
    # Threads of Gloo or of the transport of a lost peer must not hold up the end.
    os._exit(code)
