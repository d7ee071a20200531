"""The schedules that a pipeline can follow. Each is right for any number of workers and of micro-batches.

Idle time of a worker in a step of p workers, with F, B and W the seconds of a stage and links that take no time:
    GPipe and 1F1B (p - 1)(F + B + W); interleaved with v chunks a v-th of that; ZB-H1 (p - 1)(F + B - W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.schedule import Action, Schedule

Cells = Sequence[tuple[int, int]]
"""Stage and micro-batch."""


def gpipe(num_workers: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes: holds every micro-batch (Huang et al. 2019)."""
    return _one_stage_each("gpipe", num_workers, num_microbatches, [num_microbatches] * num_workers)


def one_f_one_b(num_workers: int, num_microbatches: int, in_flight: Sequence[int] | None = None) -> Schedule:
    """One forward pass for each backward pass, once enough micro-batches are under way (Narayanan et al. 2019).

    Args:
        num_workers: of the pipeline, with one stage each.
        num_microbatches: of a step.
        in_flight: by worker, the most micro-batches that it holds; it cannot hold more than the one before. The
            default, p - stage, is the least that keeps equal workers busy where links take no time. Where they do, it
            takes as many more as are computed while messages are on their way to the last stage and back.

    Raises:
        ConfigError: a number is below 1, or there is not one per worker.
    """
    limits = _textbook(num_workers) if in_flight is None else in_flight
    return _one_stage_each("1f1b", num_workers, num_microbatches, limits)


def interleaved(num_workers: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B with several stages a worker: less idle, more messages and more in flight (Narayanan et al. 2021).

    Micro-batches go in groups of as many as there are workers, each group through one chunk after the other. Of a last
    group that is not full the missing ones are left out of the schedule of a full one: nobody waits for them.

    Raises:
        ConfigError: a number is below 1.
    """
    _check(num_workers, num_microbatches, num_chunks=num_chunks)
    groups = range(0, num_microbatches, num_workers)
    in_flight, actions = [], []
    for worker in range(num_workers):
        stages = range(worker, num_workers * num_chunks, num_workers)
        forward, backward = (
            [(stage, first + index) for first in groups for stage in order for index in range(num_workers)]
            for order in (stages, stages[::-1])
        )
        limit = 2 * (num_workers - 1 - worker) + (num_chunks - 1) * num_workers + 1
        in_flight.append(min(limit, num_microbatches * num_chunks))
        whole_groups = _alternate(forward, backward, limit)
        actions.append(tuple(action for action in whole_groups if action.microbatch < num_microbatches))
    return Schedule("interleaved", num_workers, num_chunks, num_microbatches, False, tuple(in_flight), tuple(actions))


def zb_h1(num_workers: int, num_microbatches: int) -> Schedule:
    """ZB-H1 of Qi et al. 2023: W fills what 1F1B leaves idle at the end, in 1F1B's memory.

    Every worker holds up to as many micro-batches as there are workers; the first one does so in 1F1B too.

    Raises:
        ConfigError: a number is below 1.
    """
    in_flight = [num_workers] * num_workers
    return replace(zero_bubble(num_workers, num_microbatches, _textbook(num_workers), in_flight), name="zb_h1")


def zero_bubble(num_workers: int, num_microbatches: int, warm_up: Sequence[int], in_flight: Sequence[int]) -> Schedule:
    """ZB-H1 with numbers of one's own, such as slow links need.

    Args:
        num_workers: of the pipeline, with one stage each.
        num_microbatches: of a step.
        warm_up: by worker, forward passes before the first B: what `one_f_one_b` calls in flight.
        in_flight: by worker, the most micro-batches that it holds until W, at least `warm_up`. The difference is how
            many W are put off to the end of the step.

    Raises:
        ConfigError: a number is below 1, there is not one per worker, or `in_flight` is below `warm_up`.
    """
    if any(held < first for held, first in zip(in_flight, warm_up, strict=False)):
        raise ConfigError(
            f"in_flight={_listed(in_flight)} of a zero-bubble schedule: a worker holds what it begins with, so that no "
            f"number may be below that of warm_up={_listed(warm_up)}"
        )
    _check(num_workers, num_microbatches, in_flight=in_flight)
    return _one_stage_each("zero_bubble", num_workers, num_microbatches, warm_up, in_flight)


def _one_stage_each(
    name: str,
    num_workers: int,
    num_microbatches: int,
    warm_up: Sequence[int],
    in_flight: Sequence[int] | None = None,
) -> Schedule:
    """A schedule of one stage per worker, with W as an action of its own where `in_flight` says how many may wait."""
    _check(num_workers, num_microbatches, in_flight=warm_up)
    # A worker that began with more than the one before would wait for it, and the one before for the first B.
    warm_up = list(accumulate(warm_up, min))
    held = warm_up if in_flight is None else in_flight
    actions = []
    for worker in range(num_workers):
        cells = [(worker, microbatch) for microbatch in range(num_microbatches)]
        put_off = None if in_flight is None else held[worker] - warm_up[worker]
        actions.append(_alternate(cells, cells, warm_up[worker], put_off))
    promised = tuple(min(number, num_microbatches) for number in held)
    return Schedule(name, num_workers, 1, num_microbatches, in_flight is not None, promised, tuple(actions))


def _alternate(forward: Cells, backward: Cells, warm_up: int, put_off: int | None = None) -> tuple[Action, ...]:
    """Forward passes up to `warm_up`, then one for each backward pass; with `put_off`, as many W wait at any time."""
    actions = [Action("F", *cell) for cell in forward[:warm_up]]
    for index, cell in enumerate(backward):
        actions.append(Action("B", *cell))
        if put_off is not None and index >= put_off:
            actions.append(Action("W", *backward[index - put_off]))
        if warm_up + index < len(forward):
            actions.append(Action("F", *forward[warm_up + index]))
    if put_off is not None:
        actions += [Action("W", *cell) for cell in backward[max(len(backward) - put_off, 0) :]]
    return tuple(actions)


def _textbook(num_workers: int) -> list[int]:
    """What 1F1B holds where links take no time."""
    return list(range(num_workers, 0, -1))


def _check(
    num_workers: int, num_microbatches: int, num_chunks: int = 1, in_flight: Sequence[int] | None = None
) -> None:
    given = {"num_workers": num_workers, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    for name, number in given.items():
        if number < 1:
            raise ConfigError(f"{name}={number} of a schedule: there must be at least one")
    if in_flight is not None and (len(in_flight) != num_workers or min(in_flight) < 1):
        raise ConfigError(
            f"in_flight={_listed(in_flight)} of a schedule: each of the {num_workers} workers needs a number "
            "of 1 or more"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
