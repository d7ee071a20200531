from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.comm.tree_sum import Node, TreeSum, cover
from mlx_distributed.elastic.assignment import MAX_SLOWDOWN, Share, assign, undivided

WEIGHTS = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5)


def leaves(nodes: tuple[Node, ...]) -> list[int]:
    return [leaf for node in nodes for leaf in range(*node)]


def fastest_s(num: int, weights: list[float]) -> float:
    """By trying: who would be done first with one more takes it."""
    done = [0] * len(weights)
    for _ in range(num):
        rank = min(range(len(weights)), key=lambda r: (done[r] + 1) / weights[r])
        done[rank] += 1
    return max(count / weight for count, weight in zip(done, weights, strict=True))


@given(num_leaves=st.integers(1, 40), weights=WEIGHTS)
def test_a_whole_step_is_cut_into_ranges_by_speed(num_leaves: int, weights: list[float]) -> None:
    shares = assign(num_leaves, [()] * len(weights), weights)
    assert [leaf for share in shares for leaf in leaves(share.compute)] == list(range(num_leaves))
    slowest_s = max(len(leaves(share.compute)) / weight for share, weight in zip(shares, weights, strict=True))
    assert slowest_s <= fastest_s(num_leaves, weights) * (1 + MAX_SLOWDOWN) + 1e-6
    for share in shares:
        assert share.keep == ()
        if share.compute:
            assert list(share.compute) == cover(share.compute[0][0], share.compute[-1][1], num_leaves)


def test_ranges_are_aligned_where_that_costs_nothing() -> None:
    """Rounding to the nearest would give [0, 5), [5, 11) and [11, 16), which take eight partial sums."""
    shares = assign(16, [()] * 3, [1.0, 1.0, 1.0])
    assert sum(len(share.compute) for share in shares) == 5
    assert max(len(leaves(share.compute)) for share in shares) == 6


def test_speeds_of_two_to_one_to_one() -> None:
    assert assign(8, [()] * 3, [2.0, 1.0, 1.0]) == [
        Share((), ((0, 4),)),
        Share((), ((4, 6),)),
        Share((), ((6, 8),)),
    ]


def test_what_a_dead_worker_leaves_goes_to_the_others_by_speed() -> None:
    held: list[tuple[Node, ...]] = [((0, 4),), ((8, 12),), ((12, 16),)]
    shares = assign(16, held, [2.0, 1.0, 1.0])
    assert [share.keep for share in shares] == held
    assert [share.compute for share in shares] == [((4, 6),), ((6, 7),), ((7, 8),)]


def test_what_two_hold_is_kept_by_the_one_that_holds_more() -> None:
    shares = assign(8, [((4, 6), (6, 7)), ((0, 4), (4, 8))], [1.0, 1.0])
    assert shares == [Share((), ()), Share(((0, 4), (4, 8)), ())]
    assert assign(4, [((0, 2),), ((0, 2),)], [1.0, 1.0])[0].keep == ((0, 2),)


@given(num_leaves=st.integers(1, 24), weights=WEIGHTS, seed=st.integers(0, 2**32 - 1))
def test_every_micro_batch_is_in_the_sum_once_whoever_holds_what(
    num_leaves: int, weights: list[float], seed: int
) -> None:
    """Members hold any sub-trees, also the same ones; with what they compute, the tree is complete."""
    rng = random.Random(seed)
    held: list[tuple[Node, ...]] = []
    for _ in weights:
        tree: TreeSum[int] = TreeSum(num_leaves)
        for leaf in rng.sample(range(num_leaves), rng.randint(0, num_leaves)):
            tree.put((leaf, leaf + 1), 1)
        held.append(tuple(tree.parts))
    shares = assign(num_leaves, held, weights)
    total: TreeSum[int] = TreeSum(num_leaves)
    num_missing = 0
    for share, mine in zip(shares, held, strict=True):
        assert set(share.keep) <= set(mine)
        num_missing += len(leaves(share.compute))
        for node in (*share.keep, *share.compute):
            total.put(node, node[1] - node[0])
    assert total.total == num_leaves
    slowest_s = max(len(leaves(share.compute)) / weight for share, weight in zip(shares, weights, strict=True))
    assert slowest_s <= fastest_s(num_missing, weights) * (1 + MAX_SLOWDOWN) + 1e-6


@given(num_leaves=st.integers(1, 24), size=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_who_cannot_put_in_a_half_puts_in_all_or_nothing(num_leaves: int, size: int, seed: int) -> None:
    rng = random.Random(seed)
    edges = [sorted(rng.choices(range(num_leaves + 1), k=2)) for _ in range(size)]
    held = [tuple(cover(lo, hi, num_leaves)) for lo, hi in edges]
    kept = undivided(held)
    assert all(mine in (nodes, ()) for mine, nodes in zip(kept, held, strict=True))
    shares = assign(num_leaves, kept, [1.0] * size)
    assert [share.keep for share in shares] == kept
    put_in = [leaf for mine in kept for leaf in leaves(mine)]
    assert len(put_in) == len(set(put_in))
    for mine, nodes in zip(kept, held, strict=True):
        assert mine or not nodes or set(leaves(nodes)) & set(put_in)
    assert max(map(len, map(leaves, kept))) == max(map(len, map(leaves, held)))
