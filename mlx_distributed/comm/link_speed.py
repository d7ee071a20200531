"""What the links of ranks give, and what of it is worth a difference in shares. `probe` measures it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIKE = 1.25
"""Links whose figures differ by no more count as alike: so much is noise, and unequal slices cost a little."""

FAR_APART = 2.5
"""By so much the directions of a link differ that is not the same both ways. (Noise was up to 2.)"""


class LinkSpeed(NamedTuple):
    """Of one rank."""

    bytes_per_s: float
    """Each way while both are busy; or what the links of all others give together, if that is less."""
    round_trip_s: float
    """Of a short message, to the nearest of the others and back."""


UNKNOWN = LinkSpeed(0.0, 0.0)


def both_ways(sent: float, received: float) -> float:
    """The figure of a link of which both directions were measured: the better one, as TCP has now and then lost its
    way in one of them, but where they are far apart the worse one. As much is to go each way."""
    return min(sent, received) if max(sent, received) > FAR_APART * min(sent, received) else max(sent, received)


def to_measure(bandwidths: Sequence[float]) -> list[int]:
    """The ranks whose links are to be measured.

    Where nobody has come whose link is not known, nothing is. Otherwise those of the newcomers, and of the others all
    that may give more than their figure, as the others together did not take more.

    Args:
        bandwidths: by rank, 0 where it is not known.
    """
    if all(bandwidths):
        return []
    total = sum(bandwidths)
    return [rank for rank, known in enumerate(bandwidths) if not known or total - known <= ALIKE * known]


def levelled(bandwidths: Sequence[float]) -> list[float]:
    """Figures without the differences that are noise: each as the mean of those that it is alike with.

    From the fastest one down, all that are within `ALIKE` of the fastest that is left form a group.
    """
    found = [0.0] * len(bandwidths)
    left = sorted(range(len(bandwidths)), key=lambda rank: -bandwidths[rank])
    while left:
        group = [rank for rank in left if bandwidths[rank] * ALIKE >= bandwidths[left[0]]]
        mean = sum(bandwidths[rank] for rank in group) / len(group)
        for rank in group:
            found[rank] = mean
        left = left[len(group) :]
    return found
