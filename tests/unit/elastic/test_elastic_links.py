"""What is known of links travels with standings and epochs; what is not known is measured once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from elastic_desk import Desk
from test_elastic_grpc import Worker, running

from mlx_distributed.comm.link_speed import UNKNOWN, LinkSpeed
from mlx_distributed.elastic.inquiry import status_of
from mlx_distributed.elastic.links import share_by_links
from mlx_distributed.elastic.protocol import Seat, WorkerId


class Links:
    """Of a group: what they give, what was asked for, and by what the slices are shared."""

    def __init__(self, *bandwidths: float, at_first: Sequence[float] = ()) -> None:
        self.links = [LinkSpeed(bandwidth, 0.001) for bandwidth in bandwidths]
        self.at_first = [LinkSpeed(bandwidth, 0.002) for bandwidth in at_first]
        self.measured: list[list[int]] = []
        self.shares: Sequence[float] | None = None

    def measure_links(self, centres: Collection[int]) -> list[LinkSpeed]:
        links = self.links if self.measured else self.at_first or self.links
        self.measured.append(list(centres))
        return [link if rank in centres else UNKNOWN for rank, link in enumerate(links)]

    def share_by(self, bandwidths: Sequence[float]) -> None:
        self.shares = bandwidths


SEATS = [Seat(WorkerId(name, "1"), f"{name}.local:4000", 1.0) for name in "abc"]


def test_links_that_nobody_knows_are_measured_and_then_known() -> None:
    group = Links(940.0, 960.0, 190.0)
    assert share_by_links(SEATS, 2, group) == (190.0, 0.001)
    assert (group.measured, group.shares) == ([[0, 1, 2]] * 2, [950.0, 950.0, 190.0])

    known = [replace(seat, bandwidth=link.bytes_per_s) for seat, link in zip(SEATS, group.links, strict=True)]
    again = Links(0.0, 0.0, 0.0)
    assert share_by_links(known, 2, again) is None
    assert (again.measured, again.shares) == ([], group.shares)


def test_of_a_newcomer_the_link_is_measured_alone() -> None:
    seats = [*(replace(seat, bandwidth=100.0) for seat in SEATS), Seat(WorkerId("d", "1"), "d.local:4000", 1.0)]
    group = Links(1.0, 1.0, 1.0, 20.0)
    assert [share_by_links(seats, rank, group) for rank in range(4)] == [None, None, None, (20.0, 0.001)]
    assert (group.measured, group.shares) == ([[3]] * 8, [100.0, 100.0, 100.0, 20.0])


def test_links_that_seem_to_differ_are_measured_again() -> None:
    group = Links(700.0, 930.0, 950.0, at_first=(940.0, 960.0, 300.0))
    assert share_by_links(SEATS, 0, group) == (940.0, 0.002)
    assert (group.measured, group.shares) == ([[0, 1, 2]] * 2, [950.0] * 3)
    alike = Links(940.0, 960.0, 950.0)
    share_by_links(SEATS, 0, alike)
    assert (alike.measured, alike.shares) == ([[0, 1, 2]], [950.0] * 3)


def test_a_link_that_gave_nothing_changes_no_shares() -> None:
    group = Links(100.0, 0.0, 100.0)
    assert share_by_links(SEATS, 1, group) == (0.0, 0.001)
    assert group.shares is None


@pytest.mark.parametrize("num", [1, 3])
def test_on_one_machine_nothing_is_measured(num: int) -> None:
    group = Links()
    seats = [replace(seat, address=f"127.0.0.1:{rank}") for rank, seat in enumerate(SEATS[:num])]
    assert share_by_links(seats, 0, group) is None
    assert (group.measured, group.shares) == ([], None)


def test_what_workers_say_of_their_links_comes_with_the_next_epoch_and_is_shown() -> None:
    desk = Desk()
    desk.enter("a", "b")
    assert [seat.bandwidth for seat in desk.epoch.seats] == [0.0, 0.0]
    for name, bandwidth in (("a", 1e8), ("b", 2e7)):
        desk.report(name, epoch=desk.epoch.id, bandwidth=bandwidth, round_trip_s=0.001)
    assert [seat.bandwidth for seat in desk.epoch.seats] == [0.0, 0.0], "the members of an epoch must know the same"
    desk.hello("c")
    assert [(seat.worker.name, seat.bandwidth) for seat in desk.epoch.seats] == [("a", 1e8), ("b", 2e7), ("c", 0.0)]
    shown = status_of(desk.state, desk.now_s).members
    assert [(member.bandwidth, member.round_trip_s) for member in shown] == [(1e8, 0.001), (2e7, 0.001), (0.0, 0.0)]


def test_a_worker_tells_what_its_link_gives(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run:
        worker = Worker("a", run.address)
        worker.wait(lambda view: view.epoch)
        worker.membership.change(lambda view: view, link=LinkSpeed(1e8, 0.001))
        while not run.coordinator.state.members["a"].standing.bandwidth:
            pass
        standing = run.coordinator.state.members["a"].standing
        assert (standing.bandwidth, standing.round_trip_s, standing.speed) == (1e8, 0.001, 0.0)
        worker.leave()
