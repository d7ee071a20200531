"""`NativeComm`: a group of `mx.distributed`, for a run that `mlx.launch` has started.

Two promises of `Communicator` cannot be kept here, as MLX offers neither: sums are in the order of the backend, so that
the last bits depend on the number of ranks, and there is no deadline: a peer that stops is waited for for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator, Parts, Pending, Traffic, add_buckets
from mlx_distributed.comm.buckets import Bucket, BucketLayout
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.comm.wire import array_from_chunks, array_to_chunks
from mlx_distributed.errors import CommError

_NO_SLICES = "a configuration that needs slices of a native group is refused"

T = TypeVar("T")


class NativeComm(Communicator):
    """A group over `mx.distributed`; see `base.Communicator` for the calls.

    Args:
        backend: of `mx.distributed.init`, such as `ring` or `jaccl`; `any` takes what `mlx.launch` has prepared.

    Raises:
        CommError: no backend could be initialised.
    """

    generation = 0

    def __init__(self, backend: str = "any") -> None:
        self._failure: str | None = None
        self.traffic = Traffic()
        self._group = self._guard("init", lambda: mx.distributed.init(strict=True, backend=backend))
        self.rank, self.size = self._group.rank(), self._group.size()

    def start_all_reduce(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> Pending:
        results = []
        for shape, parts in zip(layout, buckets, strict=True):
            own: Bucket | None = None
            for node in sorted(parts):
                own = list(parts[node]) if own is None else add_buckets(own, parts[node])
            if own is None:
                own = [mx.zeros(leaf.shape, shape.dtype) for leaf in shape.leaves]
            flat = mx.concatenate([array.reshape(-1) for array in own])
            start_s = time.monotonic()
            summed = self._sum(flat, f"all_reduce of {what}")
            self.traffic.reduce_s += time.monotonic() - start_s
            self.traffic.sent_bytes += summed.nbytes
            results.append(shape.split(summed))
        return lambda: results

    def slices(self, layout: Sequence[BucketLayout]) -> list[list[tuple[int, int]]]:
        raise AssertionError(_NO_SLICES)

    def reduce_scatter(
        self,
        layout: Sequence[BucketLayout],
        num_leaves: int,
        buckets: Iterable[Parts],
        what: str,
        feedback: Feedback | None = None,
    ) -> list[mx.array]:
        raise AssertionError(_NO_SLICES)

    def all_gather_slices(self, layout: Sequence[BucketLayout], own: Sequence[mx.array], what: str) -> list[Bucket]:
        raise AssertionError(_NO_SLICES)

    def all_gather(self, array: mx.array, what: str) -> list[mx.array]:
        name, mine = f"all_gather of {what}", _to_bytes(array)
        sizes = _integers(self._sum(_one_hot(self.rank, self.size, mine.size), name))
        padded = mx.concatenate([mine, mx.zeros(max(sizes) - mine.size, mx.uint8)])
        gathered = self._guard(name, lambda: _evaluated(mx.distributed.all_gather(padded, group=self._group)))
        rows = gathered.reshape(self.size, -1)
        return [_from_bytes(rows[rank, :size]) for rank, size in enumerate(sizes)]

    def broadcast(self, array: mx.array | None, root: int, what: str) -> mx.array:
        # All but the root give zeros, and adding zeros changes no byte.
        name = f"broadcast of {what}"
        mine = _to_bytes(array) if self.rank == root and array is not None else mx.zeros(0, mx.uint8)
        (size,) = _integers(self._sum(mx.array([mine.size], mx.int64), name))
        padded = mine if mine.size else mx.zeros(size, mx.uint8)
        return _from_bytes(self._sum(padded, name))

    def send(self, array: mx.array, peer: int, tag: int, what: str) -> None:
        name, data = f"send of {what}", _to_bytes(array)

        def send(piece: mx.array) -> None:
            self._guard(name, lambda: _evaluated(mx.distributed.send(piece, peer, group=self._group)))

        send(mx.array([tag, data.size], mx.int64))
        send(data)

    def recv(self, peer: int, tag: int, what: str) -> mx.array:
        name = f"recv of {what}"

        def receive(num_elements: int, dtype: mx.Dtype) -> mx.array:
            return self._guard(
                name, lambda: _evaluated(mx.distributed.recv((num_elements,), dtype, peer, group=self._group))
            )

        sent_tag, size = _integers(receive(2, mx.int64))
        if sent_tag != tag:
            # What follows cannot be told apart from what is due, so the group is dead.
            self._failure = f"sent tag {sent_tag} where {tag} was due"
            raise CommError(name, peer, self.generation, 0.0, self._failure)
        return _from_bytes(receive(size, mx.uint8))

    def barrier(self, what: str) -> None:
        self._sum(mx.zeros(1), f"barrier of {what}")

    def check(self, what: str) -> None:
        if self._failure is not None:
            raise CommError(what, None, self.generation, 0.0, self._failure)

    def close(self, error: BaseException | None = None) -> None:
        """A native group lives as long as its process, and `mlx.launch` ends all ranks when one has failed."""

    def _sum(self, array: mx.array, name: str) -> mx.array:
        return self._guard(name, lambda: _evaluated(mx.distributed.all_sum(array, group=self._group)))

    def _guard(self, name: str, call: Callable[[], T]) -> T:
        """After a failure the group would hang rather than fail again, so it is not used again."""
        start_s = time.monotonic()
        if self._failure is None:
            try:
                return call()
            except (RuntimeError, ValueError) as error:
                self._failure = str(error)
        raise CommError(name, None, self.generation, time.monotonic() - start_s, self._failure)


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def _integers(array: mx.array) -> list[int]:
    return [int(value) for value in np.asarray(array)]


def _one_hot(index: int, size: int, value: int) -> mx.array:
    return mx.array([value if i == index else 0 for i in range(size)], mx.int64)


def _to_bytes(array: mx.array) -> mx.array:
    """Any array as uint8, its dtype and shape in front."""
    meta, *body = array_to_chunks(array)
    head = len(meta).to_bytes(4, "little") + meta
    return mx.array(np.frombuffer(b"".join([head, *body]), np.uint8))


def _from_bytes(data: mx.array) -> mx.array:
    raw = np.asarray(data).tobytes()
    length = int.from_bytes(raw[:4], "little")
    return array_from_chunks([raw[4 : 4 + length], raw[4 + length :]])
