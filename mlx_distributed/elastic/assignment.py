"""Who computes which micro-batches of a step in an epoch, be it a whole step or what a dead worker has left of one.

Every member works this out for itself, from what all members hold and the weights that came with the epoch; plain
floating point in a fixed order gives the same answer on every machine. The result of the step does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mlx_distributed.comm.tree_sum import Node, cover

MAX_SLOWDOWN = 0.05
"""A step may take so much longer if fewer partial sums travel then."""


@dataclass(frozen=True)
class Share:
    """The part of one member. Over all members, `keep` and `compute` cover every micro-batch once."""

    keep: tuple[Node, ...]
    """Partial sums that it holds and puts in. What else it holds, others hold too: it forgets that."""
    compute: tuple[Node, ...]
    """Whole sub-trees whose micro-batches it is to compute."""


def assign(num_leaves: int, held: Sequence[tuple[Node, ...]], weights: Sequence[float]) -> list[Share]:
    """Shares by rank, such that all are done as soon as they can, or at most 5 % later and with fewer sub-trees.

    Args:
        num_leaves: micro-batches of the step.
        held: by rank, the partial sums of this step that a member has from before; empty tuples where a step begins.
        weights: speeds, above 0.
    """
    return list(_assign(num_leaves, tuple(held), tuple(weights)))


def undivided(held: Sequence[tuple[Node, ...]]) -> list[tuple[Node, ...]]:
    """Of what members hold, what can be put in where each puts in all that it holds or nothing.

    Whoever holds the most goes first, and of those that hold as much the lower rank.
    """
    leaves = [{leaf for lo, hi in nodes for leaf in range(lo, hi)} for nodes in held]
    taken: set[int] = set()
    kept = set()
    for rank in sorted(range(len(held)), key=lambda rank: -len(leaves[rank])):
        if not leaves[rank] & taken:
            kept.add(rank)
            taken |= leaves[rank]
    return [nodes if rank in kept else () for rank, nodes in enumerate(held)]


@lru_cache(maxsize=4)
def _assign(num_leaves: int, held: tuple[tuple[Node, ...], ...], weights: tuple[float, ...]) -> tuple[Share, ...]:
    kept = _without_doubles(held)
    taken = {leaf for nodes in kept for lo, hi in nodes for leaf in range(lo, hi)}
    missing = [leaf for leaf in range(num_leaves) if leaf not in taken]
    edges = _cut(missing, weights, num_leaves)
    return tuple(
        Share(tuple(sorted(nodes)), tuple(_cover(missing[start:stop], num_leaves)))
        for nodes, start, stop in zip(kept, edges, edges[1:], strict=False)
    )


def _without_doubles(held: Sequence[Sequence[Node]]) -> list[list[Node]]:
    """Of what members hold, nodes that do not overlap: two hold the same if one was given up and came back.

    Nodes of a tree are nested or apart, so the larger one wins, which saves the most work; then the lower rank.
    """
    kept: list[list[Node]] = [[] for _ in held]
    taken: set[int] = set()
    nodes = [(node, rank) for rank, mine in enumerate(held) for node in mine]
    for (lo, hi), rank in sorted(nodes, key=lambda item: (item[0][0] - item[0][1], item)):
        if lo not in taken:
            kept[rank].append((lo, hi))
            taken.update(range(lo, hi))
    return kept


def _cut(leaves: Sequence[int], weights: Sequence[float], num_leaves: int) -> list[int]:
    """Where to cut `leaves` into one piece per rank: the fewest sub-trees within the time that is allowed.

    By dynamic programming over ranks and places to cut. Ties go to the piece sizes that fit the weights best.
    """
    limit_s = _fastest_s(len(leaves), weights) * (1 + MAX_SLOWDOWN)
    most = [math.floor(limit_s * weight + 1e-9) for weight in weights]
    # By place reached: sub-trees so far, the misfit, and the cuts.
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (0, 0.0, (0,))}
    for rank, weight in enumerate(weights):
        after = sum(most[rank + 1 :])
        reached: dict[int, tuple[int, float, tuple[int, ...]]] = {}
        for start, (num_nodes, misfit, cuts) in best.items():
            for stop in range(max(start, len(leaves) - after), min(start + most[rank], len(leaves)) + 1):
                num = num_nodes + len(_cover(leaves[start:stop], num_leaves))
                candidate = (num, misfit + (stop - start) ** 2 / weight, (*cuts, stop))
                if stop not in reached or candidate < reached[stop]:
                    reached[stop] = candidate
        best = reached
    return list(best[len(leaves)][2])


def _fastest_s(num: int, weights: Sequence[float]) -> float:
    """The least time in which ranks with these speeds compute `num` micro-batches, each one by one rank."""
    counts = [0] * len(weights)
    for _ in range(num):
        rank = min(range(len(weights)), key=lambda r: (counts[r] + 1) / weights[r])
        counts[rank] += 1
    return max(count / weight for count, weight in zip(counts, weights, strict=True))


def _cover(leaves: Sequence[int], num_leaves: int) -> list[Node]:
    """The fewest nodes over these leaves, which ascend; where they do not touch, a new node begins."""
    nodes: list[Node] = []
    start = 0
    for index in range(1, len(leaves) + 1):
        if index == len(leaves) or leaves[index] != leaves[index - 1] + 1:
            nodes += cover(leaves[start], leaves[index - 1] + 1, num_leaves)
            start = index
    return nodes
