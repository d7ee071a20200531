"""What other ranks hold, on its way to rank 0, which writes it into a checkpoint or the finished model, and what the
stages of a pipeline get from a checkpoint. Rank 0 reads and writes for all, array by array: of what the others hold it
has a few at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.wire import DTYPES, NOT_AS_EXPECTED
from mlx_distributed.errors import CommError
from mlx_distributed.models import trainable
from mlx_distributed.models.tensor_file import Arriving
from mlx_distributed.parallel.adamw import STEP
from mlx_distributed.train.agreement import broadcast_bytes
from mlx_distributed.train.checkpoint import Checkpoint
from mlx_distributed.train.checkpoint.segments import STAGE_OPTIMIZER, STAGE_PARAMETERS
from mlx_distributed.train.state import TrainState

_TAG = 4
_WHAT = "what only one worker has"
_AHEAD_BYTES = 32 << 20
"""Of arrays that are on their way at a time."""


def named(state: TrainState) -> Arrays:
    """All that a stage has, named as in the file of a rank."""
    arrays = {STAGE_PARAMETERS + name: array for name, array in state.parameters.items()}
    return arrays | {STAGE_OPTIMIZER + name: array for name, array in state.optimizer.items() if name != STEP}


def give(arrays: Arrays, comm: Communicator) -> None:
    """Hand arrays of this rank to rank 0, when that asks for them through `taken`. Raises CommError."""
    kinds = {name: [array.shape, str(array.dtype)] for name, array in arrays.items()}
    _answer(mx.array(np.frombuffer(json.dumps(kinds).encode(), np.uint8)), comm)
    for array in arrays.values():
        _answer(array, comm)


def taken(rank: int, comm: Communicator) -> Arriving:
    """On rank 0: what a rank gives. Raises CommError, also while it arrives."""
    _ask(rank, comm)
    sent = np.asarray(comm.recv(rank, _TAG, _WHAT)).tobytes()
    try:
        like = {name: mx.zeros(shape, DTYPES[dtype]) for name, (shape, dtype) in json.loads(sent).items()}
    except (*NOT_AS_EXPECTED, AttributeError) as error:
        reason = f"sent what are no names, shapes and dtypes ({error})"
        raise CommError(f"recv of {_WHAT}", rank, comm.generation, 0.0, reason) from None
    return Arriving(like, _fetched([(rank, due) for due in like.values()], comm))


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
