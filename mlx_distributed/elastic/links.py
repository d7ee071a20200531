"""The links between the workers of an epoch: what nobody knows of them is measured, and slices are shared by them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from mlx_distributed.comm.link_speed import UNKNOWN, LinkSpeed, levelled, to_measure
from mlx_distributed.elastic.protocol import Seat

MAX_TIMES = 2
"""So many times a link is measured where links seem to differ, and the best figure counts: a machine that was busy with
something else for a moment must not have a slow link for the rest of the run."""


class Linked(Protocol):
    """A group that can measure its links; `comm.grpc_comm.GrpcComm` says more."""

    def measure_links(self, centres: Collection[int]) -> list[LinkSpeed]: ...
    def share_by(self, bandwidths: Sequence[float]) -> None: ...


def share_slices(bandwidths: Sequence[float], group: Linked) -> dict[int, LinkSpeed]:
    """Have every rank add up as much as its link is good for; called by all, before they do anything else.

    Args:
        bandwidths: by rank, as far as they are known, and 0 otherwise; the same on every rank.
        group: of two ranks or more, connected.

    Returns:
        What was measured, by rank.

    Raises:
        CommError: a rank is lost.
    """
    found, best = list(bandwidths), dict.fromkeys(to_measure(bandwidths), UNKNOWN)
    for _ in range(MAX_TIMES if best else 0):
        links = group.measure_links(best)
        for rank in best:
            best[rank] = max(best[rank], links[rank])
            found[rank] = best[rank].bytes_per_s
        if len(set(levelled(found))) == 1:
            break
    if all(found):
        group.share_by(levelled(found))
    return best


def share_by_links(seats: Sequence[Seat], rank: int, group: Linked) -> LinkSpeed | None:
    """`share_slices` among the members of an epoch. What is known of their links came with it, so that all measure the
    same ones. Workers on one machine have links that are alike: nothing is measured there.

    Args:
        seats: of the epoch.
        rank: of this worker.
        group: of the epoch, connected.

    Returns:
        What this worker's link gives, where it was measured.

    Raises:
        CommError: a member is lost.
    """
    if len({seat.address.rpartition(":")[0] for seat in seats}) == 1:
        return None
    return share_slices([seat.bandwidth for seat in seats], group).get(rank)
