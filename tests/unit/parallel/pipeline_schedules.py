"""Schedules of every kind, for property tests, and some to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hypothesis import strategies as st

from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zb_h1, zero_bubble
from mlx_distributed.parallel.schedule import Schedule
from mlx_distributed.parallel.simulate import Costs

WORKERS = st.integers(1, 6)
MICROBATCHES = st.integers(1, 13)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Of every kind, with numbers in flight above and below what would be good."""
    num_workers, num_microbatches = draw(WORKERS), draw(MICROBATCHES)
    numbers = st.lists(st.integers(1, 15), min_size=num_workers, max_size=num_workers)
    match draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb_h1", "zero_bubble"])):
        case "gpipe":
            return gpipe(num_workers, num_microbatches)
        case "1f1b":
            return one_f_one_b(num_workers, num_microbatches, draw(st.none() | numbers))
        case "interleaved":
            return interleaved(num_workers, num_microbatches, draw(st.integers(1, 4)))
        case "zb_h1":
            return zb_h1(num_workers, num_microbatches)
    warm_up, more = draw(numbers), draw(numbers)
    return zero_bubble(
        num_workers, num_microbatches, warm_up, [sum(pair) - 1 for pair in zip(warm_up, more, strict=True)]
    )


SLACKS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Micro-batches in flight per later worker, beyond the least that hides the links. As F and B take turns, a message may
have to wait for the end of one that is under way; F is a third of a micro-batch's work where F, B and W are alike."""


def candidates(num_microbatches: int, costs: Mapping[int, Costs], memory_bytes: Sequence[int]) -> list[Schedule]:
    """Schedules to choose from, as many in flight as memory has room for; arguments as for `choose`."""
    num_workers = len(memory_bytes)
    found = [interleaved(num_workers, num_microbatches, num_chunks) for num_chunks in costs if num_chunks > 1]
    if 1 in costs:
        found += _of_one_chunk(num_microbatches, costs[1], memory_bytes)
    different: dict[object, Schedule] = {}
    for schedule in found:
        different.setdefault(schedule.actions, schedule)
    return list(different.values())


def _of_one_chunk(num_microbatches: int, costs: Costs, memory_bytes: Sequence[int]) -> list[Schedule]:
    num_workers = len(costs.stages)
    found = [
        one_f_one_b(num_workers, num_microbatches),
        zb_h1(num_workers, num_microbatches),
        gpipe(num_workers, num_microbatches),
    ]
    room, split_room = (
        [
            max(memory // num_bytes if num_bytes else num_microbatches, 1)
            for memory, num_bytes in zip(memory_bytes, of_one, strict=True)
        ]
        for of_one in (
            [stage.activation_bytes for stage in costs.stages],
            [max(stage.activation_bytes, stage.residual_bytes) for stage in costs.stages],
        )
    )
    for slack in SLACKS:
        wanted = [min(number, num_microbatches) for number in _in_flight(costs, slack)]
        found.append(one_f_one_b(num_workers, num_microbatches, list(map(min, wanted, room))))
        in_flight = [min(wanted[0], number) for number in split_room]
        warm_up = list(map(min, wanted, in_flight))
        found.append(zero_bubble(num_workers, num_microbatches, warm_up, in_flight))
    return found


def _in_flight(costs: Costs, slack: float) -> list[int]:
    """Of 1F1B, by worker: p - worker, and as many as the slowest stage works off while messages are on the way."""
    num_workers = len(costs.stages)
    slowest_s = max(stage.forward_s + stage.backward_s + stage.weight_s for stage in costs.stages)
    numbers = []
    for worker in range(num_workers):
        round_trip_s = 2 * sum(costs.link_s[worker : num_workers - 1])
        hidden = round_trip_s / slowest_s if slowest_s else 0.0
        rest = num_workers - 1 - worker
        # Rounding must not add one where the numbers divide.
        numbers.append(rest + 1 + math.ceil(hidden + slack * rest - 1e-9))
    return numbers
