"""Program of one rank of a group of two over `mx.distributed`: makes every call of a `Communicator` and checks it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import from_buckets, make_layout, to_buckets
from mlx_distributed.comm.native import NativeComm
from mlx_distributed.comm.tree_sum import cover
from mlx_distributed.config import Config
from mlx_distributed.config.schema import TrainConfig
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.tokenize import Row
from mlx_distributed.errors import CommError
from mlx_distributed.models import trainable
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

NUM_LEAVES = 5
Arrays = dict[str, mx.array]


def equal(found: mx.array, expected: mx.array) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (found, expected)
    if found.size:
        bits = [np.asarray(array.reshape(-1).view(mx.uint8)) for array in (found, expected)]
        np.testing.assert_array_equal(*bits)


def leaf_sum(start: int, stop: int) -> Arrays:
    """Small whole numbers, so that any order of adding gives the same bits."""
    total = sum(range(start, stop))
    return {
        "w": mx.arange(12, dtype=mx.float32).reshape(3, 4) * total,
        "b": mx.full((2,), total, mx.float32),
        "n": mx.full((3,), total, mx.int64),
    }


def check_all_reduce(comm: Communicator) -> None:
    layout = make_layout(leaf_sum(0, 1))
    assert len(layout) == 2
    # Evenly, unevenly, and with a rank that has nothing.
    for edge in (3, 1, 0, NUM_LEAVES):
        start, stop = (0, edge) if comm.rank == 0 else (edge, NUM_LEAVES)
        parts = {node: to_buckets(layout, leaf_sum(*node)) for node in cover(start, stop, NUM_LEAVES)}
        own = ({node: buckets[i] for node, buckets in parts.items()} for i in range(len(layout)))
        reduced = from_buckets(layout, comm.all_reduce(layout, NUM_LEAVES, own, "a sum"))
        for name, expected in leaf_sum(0, NUM_LEAVES).items():
            equal(reduced[name], expected)


def check_all_gather(comm: Communicator) -> None:
    of_ranks = [mx.array([1.5, -2.0, 3.0], mx.bfloat16), mx.zeros((0, 2), mx.int32)]
    for given in (of_ranks, of_ranks[::-1], [mx.array(7, mx.uint64), mx.array([True, False])]):
        for found, expected in zip(comm.all_gather(given[comm.rank], "arrays"), given, strict=True):
            equal(found, expected)


def check_broadcast(comm: Communicator) -> None:
    for root in range(comm.size):
        for array in (mx.random.normal((5, 3), key=mx.random.key(root)).astype(mx.bfloat16), mx.zeros((0,))):
            equal(comm.broadcast(array if comm.rank == root else None, root, "an array"), array)


def check_send(comm: Communicator) -> None:
    array = mx.arange(6, dtype=mx.float16).reshape(2, 3)
    for sender in range(comm.size):
        if comm.rank == sender:
            comm.send(array, 1 - sender, 3, "an array")
        else:
            equal(comm.recv(sender, 3, "an array"), array)


def check_training(comm: Communicator) -> None:
    """Sums are in an order of the backend's own, but all ranks hold the same bits after every step."""
    random = np.random.default_rng(0)
    masks = np.arange(10) > 0
    rows = [Row(random.integers(0, 50, size).astype(np.int32), masks[:size]) for size in random.integers(3, 10, 30)]
    plan = Plan([len(row.tokens) for row in rows], [(0, len(rows), 1.0)], 6, 2, max_steps=3)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    config = Config(train=TrainConfig(global_batch_size=6, micro_batch_size=2))
    state = TrainState(model, make_optimizer(config).init(trainable(model)))
    for _ in Trainer(Phases(config, plan, rows)).steps(state, Mesh(dp=comm)):
        digest = "".join(state.digest().values()).encode()
        digests = comm.all_gather(mx.array(np.frombuffer(digest, np.uint8)), "the digests")
        equal(digests[0], digests[1])
    assert state.step == 3


def check_wrong_tag(comm: Communicator) -> None:
    """The last check: what comes after a message that nobody expected cannot be understood."""
    if comm.rank == 0:
        comm.send(mx.zeros(3), 1, 5, "an array")
        return
    with pytest.raises(CommError, match="sent tag 5 where 6 was due"):
        comm.recv(0, 6, "an array")
    with pytest.raises(CommError, match="sent tag 5 where 6 was due"):
        comm.check("the next call")


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    group = NativeComm("ring")
    assert group.size == 2
    for check in (check_all_reduce, check_all_gather, check_broadcast, check_send, check_training):
        check(group)
    group.barrier("the end")
    check_wrong_tag(group)
    group.close()
    print(f"rank {group.rank} is fine")
