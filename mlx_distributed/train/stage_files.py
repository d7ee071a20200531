"""What the stages of a pipeline hold, on its way into a checkpoint with a file for each, back out of one, and into the
finished model. Rank 0 reads and writes for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.models import trainable
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.checkpoint import Checkpoint
from mlx_distributed.train.checkpoint.segments import STAGE_OPTIMIZER, STAGE_PARAMETERS
from mlx_distributed.train.state import TrainState

_TAG = 4
_WHAT = "what a stage holds"


def give(state: TrainState, comm: Communicator) -> None:
    """Hand what this rank has to rank 0, when that asks for it through `collect`. Raises CommError."""
    arrays = {STAGE_PARAMETERS + name: array for name, array in state.parameters.items()}
    arrays |= {STAGE_OPTIMIZER + name: array for name, array in state.moments.items()}
    _give(arrays, state.num_stages, comm)


def collect(state: TrainState, comm: Communicator) -> list[Callable[[], Arrays]]:
    """On rank 0: what gets from each rank of its copy of the model what that has, named as in its file. To be called
    one after the other; there is nothing of rank 0 itself, whose part is what a checkpoint has of all ranks else."""
    return [dict, *(partial(_take, rank, comm) for rank in range(1, state.num_stages))]


def hand_out(state: TrainState, checkpoint: Checkpoint | None, comm: Communicator) -> None:
    """Give every rank its part of a checkpoint, array by array.

    Args:
        state: of this rank, which is replaced.
        checkpoint: on rank 0, what the run goes on from, if anything; the others give None.
        comm: of all ranks.

    Raises:
        CheckpointError: the parameters are not those of the model.
    """
    meta = checkpoint and checkpoint.meta
    counters = meta and [meta.step, meta.num_tokens, meta.num_skipped, meta.metrics]
    counters = json.loads(broadcast_bytes(json.dumps(counters).encode(), comm, _WHAT))
    if counters is None:
        return
    own = {STAGE_PARAMETERS: state.parameters, STAGE_OPTIMIZER: state.optimizer}
    found: dict[str, Arrays] = {kind: {} for kind in own}
    saved = _saved(checkpoint) if checkpoint else iter(())
    while True:
        kind, name, array = next(saved, ("", "", None))
        kind, name = json.loads(broadcast_bytes(json.dumps([kind, name]).encode(), comm, _WHAT))
        if not kind:
            break
        array = comm.broadcast(array, 0, _WHAT)
        if name in own[kind]:
            found[kind][name] = array
    step, num_tokens, num_skipped, state.metrics = counters
    state.restore(found[STAGE_PARAMETERS], found[STAGE_OPTIMIZER], step, num_tokens, num_skipped)


def gather_model(model: nn.Module, whole: Callable[[], nn.Module], num_stages: int, comm: Communicator) -> nn.Module:
    """On rank 0 the whole model as it is now trained; on the others what they have. Raises CommError.

    Args:
        model: the part of this rank.
        whole: gives the model as it was before.
        num_stages: workers of a copy of the model.
        comm: of all ranks.
    """
    if comm.rank:
        _give(trainable(model), num_stages, comm)
        return model
    result = whole()
    result.update(tree_unflatten(list(trainable(model).items())))
    for rank in range(1, num_stages):
        result.update(tree_unflatten(list(_take(rank, comm).items())))
    return result


def _saved(checkpoint: Checkpoint) -> Iterator[tuple[str, str, mx.array | None]]:
    for name, array in checkpoint.each_parameter():
        yield STAGE_PARAMETERS, name, array
    for name, array in checkpoint.optimizer():
        yield STAGE_OPTIMIZER, name, array


def _give(arrays: Arrays, num_stages: int, comm: Communicator) -> None:
    if 0 < comm.rank < num_stages:  # Other copies of the model have the same.
        comm.recv(0, _TAG, _WHAT)
        comm.send(mx.array(np.frombuffer(json.dumps(sorted(arrays)).encode(), np.uint8)), 0, _TAG, _WHAT)
        for name in sorted(arrays):
            comm.send(arrays[name], 0, _TAG, _WHAT)


def _take(rank: int, comm: Communicator) -> Arrays:
    comm.send(mx.zeros(0), rank, _TAG, _WHAT)  # Who sends unasked would fill our memory.
    names = json.loads(np.asarray(comm.recv(rank, _TAG, _WHAT)).tobytes())
    return {name: comm.recv(rank, _TAG, _WHAT) for name in names}
