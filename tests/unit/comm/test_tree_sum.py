from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.comm.tree_sum import TreeSum, cover, sibling, split


def pair(left: str, right: str) -> str:
    return f"({left}{right})"


def leaves(num_leaves: int) -> list[tuple[tuple[int, int], str]]:
    return [((i, i + 1), str(i)) for i in range(num_leaves)]


@pytest.mark.parametrize(
    ("num_leaves", "expected"),
    [
        (1, "0"),
        (2, "(01)"),
        (3, "((01)2)"),
        (4, "((01)(23))"),
        (5, "(((01)(23))4)"),
        (6, "(((01)(23))(45))"),
        (7, "(((01)(23))((45)6))"),
    ],
)
def test_the_tree_splits_at_the_largest_power_of_two(num_leaves: int, expected: str) -> None:
    tree = TreeSum[str](num_leaves, pair)
    for node, value in leaves(num_leaves):
        tree.put(node, value)
    assert tree.total == expected


@given(st.integers(1, 70), st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_sum(num_leaves: int, rng: random.Random) -> None:
    in_order, shuffled = TreeSum[str](num_leaves, pair), TreeSum[str](num_leaves, pair)
    for node, value in leaves(num_leaves):
        in_order.put(node, value)
    for node, value in rng.sample(leaves(num_leaves), num_leaves):
        shuffled.put(node, value)
    assert shuffled.complete
    assert shuffled.total == in_order.total


@given(st.integers(1, 70), st.lists(st.integers(0, 70), max_size=5), st.randoms(use_true_random=False))
def test_any_cut_into_ranges_gives_the_same_sum(num_leaves: int, cuts: list[int], rng: random.Random) -> None:
    """Each worker sums its range; the owner adds what they send, in any order."""
    edges = sorted([0, num_leaves, *(min(cut, num_leaves) for cut in cuts)])
    parts = []
    for start, stop in itertools.pairwise(edges):
        worker = TreeSum[str](num_leaves, pair)
        for node, value in leaves(num_leaves)[start:stop]:
            worker.put(node, value)
        assert list(worker.parts) == cover(start, stop, num_leaves)
        parts += list(worker.parts.items())
    rng.shuffle(parts)
    owner, whole = TreeSum[str](num_leaves, pair), TreeSum[str](num_leaves, pair)
    for node, value in parts:
        owner.put(node, value)
    for node, value in leaves(num_leaves):
        whole.put(node, value)
    assert owner.total == whole.total


@given(st.integers(1, 1000))
def test_a_worker_holds_few_partial_sums(num_leaves: int) -> None:
    tree, most = TreeSum[int](num_leaves), 0
    for i in range(num_leaves):
        tree.put((i, i + 1), 1)
        most = max(most, len(tree.parts))
    assert tree.total == num_leaves
    assert most <= num_leaves.bit_length()


@given(st.integers(1, 70), st.integers(0, 70), st.integers(0, 70))
def test_cover_holds_each_leaf_once_in_order(num_leaves: int, start: int, stop: int) -> None:
    nodes = cover(start, stop, num_leaves)
    assert [leaf for lo, hi in nodes for leaf in range(lo, hi)] == list(range(start, min(stop, num_leaves)))
    for node in nodes:
        sibling(node, num_leaves)  # raises unless the node is in the tree


def test_sibling_and_split() -> None:
    assert split((0, 6)) == 4
    assert split((4, 6)) == 5
    assert sibling((0, 4), 6) == (4, 6)
    assert sibling((4, 6), 6) == (0, 4)
    assert sibling((0, 6), 6) is None


@pytest.mark.parametrize("node", [(1, 3), (0, 7), (-1, 1), (2, 2), (5, 7), (3, 2)])
def test_a_node_that_is_not_in_the_tree_is_refused(node: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a node"):
        TreeSum[int](6).put(node, 1)


@pytest.mark.parametrize("again", [(0, 1), (0, 2), (0, 4)])
def test_a_leaf_is_added_once(again: tuple[int, int]) -> None:
    tree = TreeSum[int](4)
    tree.put((0, 1), 1)
    with pytest.raises(ValueError, match="twice"):
        tree.put(again, 1)
    tree.put((1, 2), 1)
    with pytest.raises(ValueError, match="twice"):
        tree.put((1, 2), 1)
    assert tree.parts == {(0, 2): 2}
    assert not tree.complete
