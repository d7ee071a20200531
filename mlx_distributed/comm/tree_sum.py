"""The canonical sum: values are added along one fixed binary tree, whoever holds which of them.

The tree over leaves 0..M-1 splits [lo, hi) at lo + the largest power of two below hi - lo, so its shape depends on M
alone. Floating-point addition is commutative but not associative: fixing the tree fixes the bits of the sum, on any
number of workers. A node of the tree is written as the half-open range (lo, hi) of the leaves below it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Generic, TypeVar

Node = tuple[int, int]
T = TypeVar("T")


def split(node: Node) -> int:
    """The leaf at which the right child of `node` begins; the node must have at least two leaves."""
    lo, hi = node
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def cover(start: int, stop: int, num_leaves: int) -> list[Node]:
    """The fewest nodes of the tree over `num_leaves` leaves that together hold exactly the leaves [start, stop)."""

    def visit(node: Node) -> list[Node]:
        lo, hi = node
        if stop <= lo or hi <= start:
            return []
        if start <= lo and hi <= stop:
            return [node]
        middle = split(node)
        return visit((lo, middle)) + visit((middle, hi))

    return visit((0, num_leaves)) if num_leaves and start < stop else []


def sibling(node: Node, num_leaves: int) -> Node | None:
    """The node with the same parent, None for the root.

    Raises:
        ValueError: `node` is not in the tree.
    """
    current, other = (0, num_leaves), None
    while current != node:
        lo, hi = current
        if not (lo <= node[0] < node[1] <= hi) or hi - lo < 2:
            raise ValueError(f"{node} is not a node of the tree over {num_leaves} leaves")
        left, right = (lo, split(current)), (split(current), hi)
        current, other = (left, right) if node[0] < right[0] else (right, left)
    return other


class TreeSum(Generic[T]):
    """Adds up leaves and partial sums as they come, in any order, along the tree.

    Two siblings are added as soon as both are there, so that a worker that puts its leaves one after the other holds at
    most about log2(num_leaves) + 1 partial sums.

    Args:
        num_leaves: M.
        add: sum of the left and the right value; operands are never modified.
    """

    def __init__(self, num_leaves: int, add: Callable[[T, T], T] = operator.add) -> None:
        self.num_leaves = num_leaves
        self.parts: dict[Node, T] = {}
        """The partial sums held, no two of which are siblings."""
        self._add = add

    def put(self, node: Node, value: T) -> None:
        """Put in the sum over the leaves of `node`.

        Raises:
            ValueError: `node` is not in the tree, or some of its leaves are here already.
        """
        other = sibling(node, self.num_leaves)
        if any(lo < node[1] and node[0] < hi for lo, hi in self.parts):
            raise ValueError(f"leaves {node[0]} to {node[1] - 1} were put in twice")
        while other is not None and other in self.parts:
            left, right = (value, self.parts.pop(other)) if node < other else (self.parts.pop(other), value)
            node = min(node, other)[0], max(node, other)[1]
            value = self._add(left, right)
            other = sibling(node, self.num_leaves)
        self.parts[node] = value

    @property
    def complete(self) -> bool:
        """Whether every leaf is in the sum."""
        return (0, self.num_leaves) in self.parts

    @property
    def total(self) -> T:
        """The sum over all leaves; there must be no leaf missing."""
        return self.parts[(0, self.num_leaves)]
