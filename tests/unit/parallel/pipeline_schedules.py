"""Schedules of every kind, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from mlx_distributed.parallel.builders import gpipe, interleaved, one_f_one_b, zb_h1, zero_bubble
from mlx_distributed.parallel.schedule import Schedule

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
