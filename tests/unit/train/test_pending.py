"""Sums that are under way: waited for once, and what was left out of them is owed from then on, or not."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.comm.compress import Feedback
from mlx_distributed.train.pending import Pending, finite


def noted(*values: float) -> Feedback:
    """Feedback that has noted what an operation left out of its only bucket."""
    feedback = Feedback()
    feedback.begin(0, len(values))[1][:] = values
    return feedback


def test_somebody_waits_once() -> None:
    num_waits = 0

    def wait() -> Arrays:
        nonlocal num_waits
        num_waits += 1
        return {"w": mx.ones(3)}

    pending = Pending(wait, {"w": mx.zeros(3)})
    assert (pending.here, num_waits) == (False, 0)
    assert pending.sums is pending.sums
    assert (pending.here, num_waits) == (True, 1)
    assert pending.computed_at is not None


@pytest.mark.parametrize(("value", "owed"), [(1.0, [2.0, 3.0]), (math.nan, [0.0, 0.0]), (-math.inf, [0.0, 0.0])])
def test_what_was_left_out_is_owed_where_the_sums_are_finite(value: float, owed: list[float]) -> None:
    feedback = noted(2.0, 3.0)
    pending = Pending(lambda: {"w": mx.zeros(4), "v": mx.array([0.0, value])})
    assert feedback.owed(0, 2).tolist() == [0.0, 0.0]
    _ = pending.sums
    assert feedback.owed(0, 2).tolist() == [0.0, 0.0]
    pending.settle(feedback)
    assert feedback.owed(0, 2).tolist() == owed
    feedback.commit()
    assert feedback.owed(0, 2).tolist() == owed


def test_a_wait_that_fails_leaves_what_is_owed() -> None:
    feedback = noted(2.0)
    feedback.commit()
    feedback.begin(0, 1)[1][:] = 5.0

    def wait() -> Arrays:
        raise KeyboardInterrupt("gone")

    pending = Pending(wait)
    with pytest.raises(KeyboardInterrupt):
        pending.settle(feedback)
    assert not pending.here
    assert feedback.owed(0, 1).tolist() == [2.0]


def test_counts_are_finite() -> None:
    assert finite({})
    assert finite({"count": mx.array([1 << 40]), "none": mx.zeros(0)})
    assert not finite({"a": mx.zeros(2), "b": mx.array(math.nan)})
