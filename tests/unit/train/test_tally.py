from __future__ import annotations

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.comm.base import LocalComm
from mlx_distributed.comm.buckets import Arrays, from_buckets, make_layout, to_buckets
from mlx_distributed.comm.tree_sum import Node, cover
from mlx_distributed.train.tally import Tally

LOSSES = st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=20)


def reduce_parts(tallies: list[Tally], edges: list[int]) -> Tally:
    """What a group finds whose rank r has computed the micro-batches edges[r] to edges[r + 1]."""
    num = len(tallies[0].losses)
    layout = make_layout(Tally.empty(num).part((0, 0)))
    parts: dict[Node, Arrays] = {}
    for tally, (start, stop) in zip(tallies, itertools.pairwise(edges), strict=True):
        parts |= {node: tally.part(node) for node in cover(start, stop, num)}
    buckets = [{node: to_buckets(layout, part)[i] for node, part in parts.items()} for i in range(len(layout))]
    arrays = from_buckets(layout, LocalComm().all_reduce(layout, num, buckets, "a test"))
    assert all(name.startswith("tally.") for name in arrays)
    tally = Tally.pop(arrays)
    assert not arrays
    return tally


@given(LOSSES, st.lists(st.integers(0, 20), max_size=3))
def test_however_the_work_is_cut_nothing_is_lost_or_rounded(losses: list[float], cuts: list[int]) -> None:
    num = len(losses)
    edges = sorted([0, num, *(min(cut, num) for cut in cuts)])
    tallies = []
    for start, stop in itertools.pairwise(edges):
        tally = Tally.empty(num)
        tally.losses[start:stop] = losses[start:stop]
        # Beyond what float32 and int32 can hold exactly.
        tally.num_tokens[start:stop] = 2**40 + 1 + np.arange(start, stop)
        tallies.append(tally)
    found = reduce_parts(tallies, edges)
    assert found.losses.tolist() == losses
    assert found.num_tokens.tolist() == [2**40 + 1 + i for i in range(num)]
    assert (found.losses.dtype, found.num_tokens.dtype) == (np.float32, np.int64)
    assert found.total_tokens == sum(2**40 + 1 + i for i in range(num))
    assert not found.stop


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_wish_to_stop_reaches_everybody(rank: int) -> None:
    tallies = [Tally.empty(4) for _ in range(3)]
    tallies[rank].stop = True
    assert reduce_parts(tallies, [0, 1, 3, 4]).stop


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 2, 5])
def test_a_loss_that_is_not_finite_stays_with_its_microbatch(bad: float, index: int) -> None:
    tallies = [Tally(np.ones(6, np.float32), np.ones(6, np.int64)) for _ in range(2)]
    for tally in tallies:
        tally.losses[index:] = bad
    found = reduce_parts(tallies, [0, 3, 6])
    assert np.isfinite(found.losses).tolist() == [i < index for i in range(6)]
    assert found.first_not_finite() == index


def test_finite_losses_name_no_microbatch() -> None:
    assert Tally(np.full(3, 3e38, np.float32), np.ones(3, np.int64)).first_not_finite() is None


def test_the_mean_is_over_label_tokens_and_added_along_the_tree() -> None:
    # (1e8 + 1) + (-1e8 + 1) and not from the left to the right: float32 has no 1e8 + 1.
    losses = np.array([1e8, 1.0, -1e8, 1.0], np.float32)
    assert Tally(losses, np.array([1, 2, 3, 4])).mean_loss == 0.0
    assert Tally(losses[[0, 2, 1, 3]], np.array([1, 2, 3, 4])).mean_loss == 0.2
    assert Tally(np.array([6.0], np.float32), np.array([4])).mean_loss == 1.5


def test_a_part_holds_what_is_below_its_node() -> None:
    part = Tally(np.array([1, 2, 3], np.float32), np.array([4, 5, 6]), stop=True).part((1, 2))
    assert {name: array.tolist() for name, array in part.items()} == {
        "tally.loss": [0, 2, 0],
        "tally.num_tokens": [0, 5, 0],
        "tally.stop": [1],
    }
    assert {array.dtype for array in part.values()} == {mx.float32, mx.int64}
