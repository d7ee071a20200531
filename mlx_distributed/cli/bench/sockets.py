"""Bare TCP sockets that run the algorithm of `comm/reduction.py`: a control, which shows what gRPC itself costs."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Sequence

import numpy as np

from mlx_distributed.cli.bench.options import ELEMENT_BYTES
from mlx_distributed.cli.bench.sides import HOST, Reduce, Side, order_tolerance
from mlx_distributed.comm.reduction import DIRECT_BYTES, chunks, slices
from mlx_distributed.comm.wire import CHUNK_BYTES
from mlx_distributed.errors import CommError

_RANK_BYTES = 4
_FLUSH_S = 1.0
"""On closing, how long a peer may take to read what it is owed."""


class SocketMesh:
    """A group of ranks with a connection per pair, and a thread for each peer that writes to it.

    Args:
        rank: of this process.
        size: of the group.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._listener = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self._sockets: dict[int, socket.socket] = {}
        self._queues: dict[int, queue.SimpleQueue[memoryview | None]] = {}
        self._writers: list[threading.Thread] = []
        self._received = np.empty((size, CHUNK_BYTES // ELEMENT_BYTES), np.float32)
        """A chunk of each rank."""

    def connect(self, addresses: Sequence[str]) -> None:
        """Dial the higher ranks, wait for the lower ones.

        Args:
            addresses: of all ranks, as host:port.

        Raises:
            CommError: a peer is not there.
        """
        try:
            for peer in range(self.rank + 1, self.size):
                host, _, port = addresses[peer].rpartition(":")
                self._sockets[peer] = socket.create_connection((host, int(port)))
                self._sockets[peer].sendall(self.rank.to_bytes(_RANK_BYTES, "little"))
            for _ in range(self.rank):
                accepted, _ = self._listener.accept()
                peer = int.from_bytes(accepted.recv(_RANK_BYTES, socket.MSG_WAITALL), "little")
                self._sockets[peer] = accepted
        except OSError as error:
            raise CommError("a connection of sockets", None, 0, 0.0, str(error)) from None
        for peer, sock in self._sockets.items():
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._queues[peer] = queue.SimpleQueue()
            self._writers.append(threading.Thread(target=self._write, args=(peer,), name=f"to-{peer}", daemon=True))
            self._writers[-1].start()

    def all_reduce(self, values: np.ndarray, result: np.ndarray) -> None:
        """Write the sum of the values of all ranks, flat float32, into `result`, to which only calls of this write.

        Raises:
            CommError: a peer is lost.
        """
        peers = [(self.rank + offset) % self.size for offset in range(1, self.size)]
        direct = self.size <= 2 or values.nbytes <= DIRECT_BYTES
        whole = (0, values.size)
        owned = [whole] * self.size if direct else slices(values.size, [1 / self.size] * self.size, 0)
        ranges = [chunks(*slice_, CHUNK_BYTES // ELEMENT_BYTES) for slice_ in owned]
        for peer in peers:
            self._send(peer, values[slice(*owned[peer])])
        for start, stop in ranges[self.rank]:
            parts = [
                values[start:stop] if rank == self.rank else self._receive(rank, self._received[rank, : stop - start])
                for rank in range(self.size)
            ]
            # A peer that has sent its part has got all of the result before, so that none of it is still being sent.
            total = np.add(parts[0], parts[1], out=result[start:stop])
            for part in parts[2:]:
                total += part
            for peer in [] if direct else peers:
                self._send(peer, total)
        for index in range(0 if direct else max(map(len, ranges))):
            for peer in peers:
                for start, stop in ranges[peer][index : index + 1]:
                    self._receive(peer, result[start:stop])

    def close(self) -> None:
        """Leave the group."""
        for waiting in self._queues.values():
            waiting.put(None)
        for writer in self._writers:
            writer.join(_FLUSH_S)
        for sock in self._sockets.values():
            with contextlib.suppress(OSError):  # The peer has closed it.
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._listener.close()

    def _send(self, peer: int, values: np.ndarray) -> None:
        if values.size:
            self._queues[peer].put(values.data.cast("B"))

    def _receive(self, peer: int, values: np.ndarray) -> np.ndarray:
        view = values.data.cast("B")
        while view:
            try:
                num_bytes = self._sockets[peer].recv_into(view, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise CommError("a sum over sockets", peer, 0, 0.0, str(error)) from None
            if not num_bytes:
                raise CommError("a sum over sockets", peer, 0, 0.0, "has closed its connection")
            view = view[num_bytes:]
        return values

    def _write(self, peer: int) -> None:
        with contextlib.suppress(OSError):  # Who reads from the same peer sees it too.
            while (data := self._queues[peer].get()) is not None:
                self._sockets[peer].sendall(data)


def sockets_side(mesh: SocketMesh) -> Side:
    """The control, into memory that is there already."""

    def prepare(values: np.ndarray) -> Reduce:
        result = np.empty_like(values)

        def reduce() -> Sequence[np.ndarray]:
            mesh.all_reduce(values, result)
            return [result]

        return reduce

    return Side("sockets", "fp32", order_tolerance(mesh.size), prepare)
