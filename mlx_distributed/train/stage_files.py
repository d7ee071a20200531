"""What the stages of a pipeline hold, on its way into a checkpoint with a file for each, back out of one, and into the
finished model. Rank 0 reads and writes for all, array by array: of what the others hold it has one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import CommError
from mlx_distributed.models import trainable
from mlx_distributed.models.tensor_file import Arriving
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.checkpoint import Checkpoint
from mlx_distributed.train.checkpoint.segments import STAGE_OPTIMIZER, STAGE_PARAMETERS
from mlx_distributed.train.state import TrainState

_TAG = 4
_WHAT = "what a stage holds"
_AHEAD_BYTES = 32 << 20
"""Of arrays that are on their way at a time."""


def give(state: TrainState, comm: Communicator) -> None:
    """Hand what this rank has to rank 0, when that asks for it through `collect`. Raises CommError."""
    if not 0 < comm.rank < state.num_stages:
        return  # Other copies of the model have the same.
    arrays = {STAGE_PARAMETERS + name: array for name, array in state.parameters.items()}
    arrays |= {STAGE_OPTIMIZER + name: array for name, array in state.moments.items()}
    kinds = {name: [array.shape, str(array.dtype).rpartition(".")[2]] for name, array in arrays.items()}
    _answer(mx.array(np.frombuffer(json.dumps(kinds).encode(), np.uint8)), comm)
    for array in arrays.values():
        _answer(array, comm)


def collect(state: TrainState, comm: Communicator) -> list[Callable[[], Arriving]]:
    """On rank 0: what gets from each rank of its copy of the model what that has, named as in its file. To be called
    one after the other; there is nothing of rank 0 itself, whose part is what a checkpoint has of all ranks else."""
    return [lambda: Arriving({}, ()), *(partial(_take, rank, comm) for rank in range(1, state.num_stages))]


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
    own = {STAGE_PARAMETERS: state.parameters, STAGE_OPTIMIZER: state.shared}
    found: dict[str, Arrays] = {kind: {} for kind in own}
    saved, ahead_bytes = _saved(checkpoint) if checkpoint else iter(()), 0
    while True:
        kind, name, array = next(saved, ("", "", None))
        kind, name = json.loads(broadcast_bytes(json.dumps([kind, name]).encode(), comm, _WHAT))
        if not kind:
            break
        array = comm.broadcast(array, 0, _WHAT)
        if name in own[kind]:
            found[kind][name] = array
        ahead_bytes += array.nbytes
        if ahead_bytes > _AHEAD_BYTES:  # Or what the others have not taken yet would pile up on rank 0.
            comm.barrier(_WHAT)
            ahead_bytes = 0
    step, num_tokens, num_skipped, state.metrics = counters
    state.restore(found[STAGE_PARAMETERS], found[STAGE_OPTIMIZER], step, num_tokens, num_skipped)


def give_finished(model: nn.Module, worker_of: Mapping[str, int], comm: Communicator) -> None:
    """Hand what is trained in the part of the model that this rank has to rank 0, which asks for it through
    `finished`. Raises CommError."""
    for name, array in trainable(model).items():
        if worker_of[name] == comm.rank:
            _answer(array, comm)


def finished(
    model: nn.Module, whole: nn.Module, worker_of: Mapping[str, int], comm: Communicator
) -> Iterator[mx.array]:
    """On rank 0: all that is trained, in the order of the names.

    Args:
        model: the part of this rank.
        whole: the model, of which nothing is evaluated.
        worker_of: by name of what is trained, the worker of a copy of the model that counts it.
        comm: of all ranks.

    Raises:
        CommError: a rank is lost, or sent something else than what was due.
    """
    own, dues = trainable(model), trainable(whole)
    of_others = _fetched([(worker_of[name], due) for name, due in dues.items() if worker_of[name]], comm)
    for name in dues:
        yield next(of_others) if worker_of[name] else own[name]


def _saved(checkpoint: Checkpoint) -> Iterator[tuple[str, str, mx.array | None]]:
    for name, array in checkpoint.each_parameter():
        yield STAGE_PARAMETERS, name, array
    for name, array in checkpoint.optimizer():
        yield STAGE_OPTIMIZER, name, array


def _answer(array: mx.array, comm: Communicator) -> None:
    comm.recv(0, _TAG, _WHAT)  # Who sends unasked would fill the memory of rank 0.
    comm.send(array, 0, _TAG, _WHAT)


def _ask(rank: int, comm: Communicator) -> None:
    comm.send(mx.zeros(0), rank, _TAG, _WHAT)


def _fetched(dues: Sequence[tuple[int, mx.array]], comm: Communicator) -> Iterator[mx.array]:
    """Arrays of other ranks, each with the shape and the dtype that are due. Some are asked for ahead of time, so that
    nobody waits for the way there and back of each."""
    num_asked = ahead_bytes = 0
    for index, (rank, due) in enumerate(dues):
        for next_rank, next_due in dues[num_asked:]:
            if num_asked > index and ahead_bytes + next_due.nbytes > _AHEAD_BYTES:
                break
            _ask(next_rank, comm)
            num_asked, ahead_bytes = num_asked + 1, ahead_bytes + next_due.nbytes
        array = comm.recv(rank, _TAG, _WHAT)
        if array.shape != due.shape or array.dtype != due.dtype:
            reason = f"sent {array.dtype}{tuple(array.shape)} where {due.dtype}{tuple(due.shape)} was due"
            raise CommError(f"recv of {_WHAT}", rank, comm.generation, 0.0, reason)
        ahead_bytes -= due.nbytes
        yield array


def _take(rank: int, comm: Communicator) -> Arriving:
    _ask(rank, comm)
    kinds = json.loads(np.asarray(comm.recv(rank, _TAG, _WHAT)).tobytes())
    like = {name: mx.zeros(shape, getattr(mx, dtype)) for name, (shape, dtype) in kinds.items()}
    return Arriving(like, _fetched([(rank, due) for due in like.values()], comm))
