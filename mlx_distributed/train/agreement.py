"""Before the first step: every rank sees the same data and model, and holds the same state."""

from __future__ import annotations

import json
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import DataError
from mlx_distributed.train.state import TrainState


def broadcast_bytes(data: bytes | None, comm: Communicator, what: str) -> bytes:
    """The bytes of rank 0; what the others give is not looked at."""
    array = None if data is None else mx.array(np.frombuffer(data, np.uint8))
    return np.asarray(comm.broadcast(array, 0, what)).tobytes()


def check_same(facts: Mapping[str, str], comm: Communicator) -> None:
    """Compare facts, such as the digest of the data, with those of rank 0.

    Raises:
        DataError: some rank has another value; names the rank and the fact.
    """
    mine = mx.array(np.frombuffer(json.dumps(facts).encode(), np.uint8))
    gathered = comm.all_gather(mine, "what each worker is about to train on")
    theirs = [json.loads(np.asarray(array).tobytes()) for array in gathered]
    for rank, other in enumerate(theirs):
        for name, value in theirs[0].items():
            if other.get(name) != value:
                raise DataError(
                    f"worker {rank} has another {name} than worker 0 ({str(other.get(name))[:16]} and {value[:16]}); "
                    "every worker must be given the same configuration, data and model"
                )


def synchronise(state: TrainState, comm: Communicator) -> None:
    """Give every rank the state of rank 0. Where all are equal, that costs a digest."""
    counters = [state.step, state.num_tokens, state.num_skipped]
    mine = json.dumps([counters, state.digest(), state.metrics]).encode()
    gathered = comm.all_gather(mx.array(np.frombuffer(mine, np.uint8)), "the state")
    theirs = [json.loads(np.asarray(array).tobytes()) for array in gathered]
    if any(other[:2] != theirs[0][:2] for other in theirs):
        parameters = _broadcast(state.parameters, comm, "the parameters")
        state.restore(parameters, _broadcast(state.shared, comm, "the optimizer's state"), *theirs[0][0])
    # Whether there is something to evaluate or to save must look the same everywhere.
    state.metrics = theirs[0][2]


def _broadcast(arrays: Arrays, comm: Communicator, what: str) -> Arrays:
    return {name: comm.broadcast(arrays[name], 0, f"{what}, {name}") for name in sorted(arrays)}
