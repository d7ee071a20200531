"""I1 to I4 of `transition`, over random orders of everything that can happen."""

from __future__ import annotations

import pickle
from functools import cache

import pytest
from elastic_process import Tape
from elastic_world import World
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

ORDERS = settings(max_examples=1670, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@cache
def settled(num_workers: int, min_workers: int) -> bytes:
    """A world in which all workers have come and taken a step, which nothing disturbs: the same for all tapes."""
    world = World(num_workers, Tape(b""), min_workers)
    world.settle_in()
    return pickle.dumps(world)


@pytest.mark.parametrize(("num_workers", "min_workers"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1)])
@ORDERS
@given(tape=st.binary(min_size=50, max_size=110))
def test_no_order_of_events_breaks_a_promise(num_workers: int, min_workers: int, tape: bytes) -> None:
    """Kills, stops, cut streams, late and doubled messages, corrupt gradients, and a coordinator that dies between
    any two actions, its last record torn. Checked after each event; then all is healed, and training must go on."""
    world: World = pickle.loads(settled(num_workers, min_workers))
    world.tape = Tape(tape)
    while not world.tape.done:
        world.step()
    event(f"{min(len(world.ledger), 10)} steps")
    assert world.state_is_lost or world.heal() or world.state_is_lost, "training goes on when the trouble is over"
