"""The sums of squares of a gradient that is spread over stages are those of the gradient in one place, bit for bit."""

from __future__ import annotations

from contextlib import suppress

import mlx.core as mx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from train_samples import on_ranks

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import BLOCK, Arrays, make_layout, to_buckets
from mlx_distributed.errors import CommError
from mlx_distributed.testing import run_ranks
from mlx_distributed.train.loss import block_sums
from mlx_distributed.train.stage_norm import StageNorm

SIZES = st.lists(st.sampled_from([1, 7, 300, BLOCK - 1, BLOCK, BLOCK + 5, 3 * BLOCK + 2]), min_size=1, max_size=8)


class Together(LocalComm):
    """All stages in one thread: until the last one has given what it has, a call ends without a result."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self._given: list[mx.array] = []
        self._num_stages = num_stages

    def all_gather(self, array: mx.array, what: str) -> list[mx.array]:
        self._given.append(array)
        if len(self._given) < self._num_stages:
            raise CommError(what, None, 0, 0.0, "not all are here yet")
        return self._given


def make_arrays(sizes: list[int]) -> Arrays:
    random = np.random.default_rng(0)
    return {f"a{i}": mx.array(random.standard_normal(size, np.float32)) for i, size in enumerate(sizes)}


@given(SIZES, st.integers(1, 4), st.integers(1 << 10, 1 << 18), st.data())
def test_sums_are_those_of_one_place(sizes: list[int], num_stages: int, bucket_bytes: int, data: st.DataObject) -> None:
    arrays = make_arrays(sizes)
    layout = make_layout(arrays, bucket_bytes)
    stages = st.lists(st.integers(0, num_stages - 1), min_size=len(sizes), max_size=len(sizes))
    stage_of = dict(zip(arrays, data.draw(stages), strict=True))
    norm, comm, found = StageNorm(layout, stage_of), Together(num_stages), []
    for stage in range(num_stages):
        own = {name: array for name, array in arrays.items() if stage_of[name] == stage}
        with suppress(CommError):
            found = norm.gather(own, stage, "a test", comm)
    for sums, bucket in zip(found, to_buckets(layout, arrays), strict=True):
        assert np.asarray(sums).tobytes() == np.asarray(block_sums(bucket)).tobytes()


def test_over_a_group() -> None:
    arrays = make_arrays([300, BLOCK, 2 * BLOCK + 5, 40])
    layout, stage_of = make_layout(arrays), dict.fromkeys(arrays, 0) | {"a0": 1, "a1": 1}

    def body(comm: Communicator) -> list[bytes]:
        own = {name: array for name, array in arrays.items() if stage_of[name] == comm.rank}
        return [np.asarray(sums).tobytes() for sums in StageNorm(layout, stage_of).gather(own, comm.rank, "x", comm)]

    expected = [np.asarray(block_sums(bucket)).tobytes() for bucket in to_buckets(layout, arrays)]
    assert on_ranks(2, body) == [expected] * 2


def test_a_stage_that_gives_something_else_is_named() -> None:
    arrays = make_arrays([300, BLOCK])
    layout = make_layout(arrays)

    def body(comm: Communicator) -> None:
        stage_of = {"a0": 0, "a1": 1}
        sizes = arrays if comm.rank == 0 else make_arrays([300, 3 * BLOCK])
        StageNorm(layout if comm.rank == 0 else make_layout(sizes), stage_of).gather(sizes, comm.rank, "the norm", comm)

    error = run_ranks(2, body)[0]
    assert isinstance(error, CommError)
    assert error.peer == 1
    assert "sums of squares were due" in str(error)
