"""Whether a schedule can be run, and the messages that its workers exchange when it is.

A send is put into the queue of its link, a directed pair of workers, and waits for nothing. A receive blocks until the
next message of its link is there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace

from mlx_distributed.errors import ConfigError
from mlx_distributed.parallel.schedule import COMPUTE, Action, Kind, Schedule, cell

_RECV: dict[Kind, Kind] = {"F": "RECV_F", "B": "RECV_B"}
_SEND: dict[Kind, Kind] = {"F": "SEND_F", "B": "SEND_B"}
_SENT: dict[Kind, Kind] = {send: kind for kind, send in _SEND.items()}
_SEND_OF: dict[Kind, Kind] = {recv: _SEND[kind] for kind, recv in _RECV.items()}

Queues = dict[int, deque[Action]]
"""By sending worker, the F and B whose input it sends to the one at hand, in the order of sending."""


def validate(schedule: Schedule) -> None:
    """Check that a schedule does each thing once and in order, holds no more than it says, and cannot hang.

    Raises:
        ConfigError: it is not so; the message names the cell.
    """
    _check_cells(schedule)
    lowered = lower(schedule)
    _check_links(lowered)
    for _ in run_order(lowered):
        pass
    for worker, (held, promised) in enumerate(zip(count_in_flight(schedule), schedule.in_flight, strict=True)):
        if held > promised:
            raise ConfigError(
                f"schedule {schedule.name}: worker {worker} holds {held} micro-batches at a time, where in_flight "
                f"allows {promised}"
            )


def lower(schedule: Schedule) -> Schedule:
    """Put the messages into a valid schedule: a send right after what makes it, a receive right before what needs it.

    Messages of a link come in the order of sending, so those sent before the needed one are received with it. That
    blocks for no longer: lowering lets no schedule hang that did not before. A lowered one is returned as it is.
    """
    if schedule.is_lowered or schedule.num_workers == 1:
        return schedule
    queues: dict[int, Queues] = {worker: defaultdict(deque) for worker in range(schedule.num_workers)}
    for worker, actions in enumerate(schedule.actions):
        for action in actions:
            target = schedule.target(action)
            if target is not None:
                queues[schedule.worker_of(target.stage)][worker].append(target)
    return replace(
        schedule, actions=tuple(tuple(_with_messages(schedule, worker, queues[worker])) for worker in queues)
    )


def run_order(lowered: Schedule) -> Iterator[tuple[int, Action]]:
    """All actions with their workers, each after what it waits for: one order in which they can happen.

    Raises:
        ConfigError: at the end, if workers wait for each other for ever.
    """
    sent: set[Action] = set()
    waiting: dict[Action, int] = {}  # For a send, the worker that cannot go on without.
    position = [0] * lowered.num_workers
    ready = list(range(lowered.num_workers))
    while ready:
        worker = ready.pop()
        actions = lowered.actions[worker]
        while position[worker] < len(actions):
            action = actions[position[worker]]
            if action.kind in _SEND_OF and (send := send_of(action)) not in sent:
                waiting[send] = worker
                break
            position[worker] += 1
            yield worker, action
            if action.kind in _SENT:
                sent.add(action)
                if action in waiting:
                    ready.append(waiting.pop(action))
    if waiting:
        stuck = "; ".join(
            f"{cell(worker, position[worker], lowered.actions[worker][position[worker]])} waits for {send} of worker "
            f"{lowered.worker_of(send.stage)}"
            for send, worker in sorted(waiting.items(), key=lambda item: item[1])
        )
        raise ConfigError(f"schedule {lowered.name} hangs, with its messages put in: {stuck}; reorder these workers")


def send_of(receive: Action) -> Action:
    """The send that a RECV_F or RECV_B takes the message of."""
    step = -1 if receive.kind == "RECV_F" else 1
    return Action(_SEND_OF[receive.kind], receive.stage + step, receive.microbatch)


def count_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """By worker, the most forward passes that it holds at a time, counted (see `Schedule.in_flight`)."""
    return tuple(
        _peak(action.kind for action in actions if action.kind in (schedule.kinds[0], schedule.kinds[-1]))
        for actions in schedule.actions
    )


def _peak(kinds: Iterator[Kind]) -> int:
    held = peak = 0
    for kind in kinds:
        held += 1 if kind == "F" else -1
        peak = max(peak, held)
    return peak


def _with_messages(schedule: Schedule, worker: int, queues: Queues) -> Iterator[Action]:
    received: set[Action] = set()
    for action in schedule.actions[worker]:
        source = schedule.source(action)
        while source is not None and action not in received:
            message = queues[schedule.worker_of(source.stage)].popleft()
            received.add(message)
            yield Action(_RECV[message.kind], message.stage, message.microbatch)
        yield action
        if schedule.target(action) is not None:
            yield Action(_SEND[action.kind], action.stage, action.microbatch)


def _check_cells(schedule: Schedule) -> None:
    """Each action that there must be is there once, on its worker, after those of the worker that it needs."""
    lowered = schedule.is_lowered
    for worker, actions in enumerate(schedule.actions):
        expected = set(_expected(schedule, worker, lowered))
        counts = Counter(actions)
        done: set[Action] = set()
        for index, action in enumerate(actions):
            problem = None
            if action not in expected:
                problem = "does not belong to this worker in this schedule"
            elif counts[action] > 1:
                problem = f"is there {counts[action]} times"
            elif missing := [need for need in _needs(schedule, action, lowered) if need not in done]:
                problem = f"comes before {missing[0]}, which it needs"
            if problem is not None:
                raise ConfigError(f"schedule {schedule.name}: {cell(worker, index, action)} {problem}")
            done.add(action)
        if len(done) < len(expected):
            first = min(expected - done, key=lambda action: (action.microbatch, action.stage))
            raise ConfigError(
                f"schedule {schedule.name}: worker {worker} has no {first}; every micro-batch goes once through "
                f"{', '.join(schedule.kinds)} of every stage"
            )


def _expected(schedule: Schedule, worker: int, lowered: bool) -> Iterator[Action]:
    for stage in range(worker, schedule.num_stages, schedule.num_workers):
        for kind in schedule.kinds:
            for microbatch in range(schedule.num_microbatches):
                action = Action(kind, stage, microbatch)
                yield action
                if lowered and schedule.source(action) is not None:
                    yield action._replace(kind=_RECV[kind])
                if lowered and schedule.target(action) is not None:
                    yield action._replace(kind=_SEND[kind])


def _needs(schedule: Schedule, action: Action, lowered: bool) -> Iterator[Action]:
    """What the same worker must have done before."""
    kind = action.kind
    if kind in _SENT:
        yield action._replace(kind=_SENT[kind])
    elif kind == "W":
        yield action._replace(kind="B")
    elif kind in COMPUTE:
        if kind == "B":
            yield action._replace(kind="F")
        source = schedule.source(action)
        if source is not None and schedule.num_workers == 1:
            yield source
        elif source is not None and lowered:
            yield action._replace(kind=_RECV[kind])


def _check_links(lowered: Schedule) -> None:
    """Receivers take the messages of a link in the order of sending."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for worker, actions in enumerate(lowered.actions):
        for action in actions:
            if action.kind in _SENT:
                target = lowered.target(action._replace(kind=_SENT[action.kind]))
                assert target is not None
                sent[worker, lowered.worker_of(target.stage)].append(action)
    position: Counter[tuple[int, int]] = Counter()
    for worker, actions in enumerate(lowered.actions):
        for index, action in enumerate(actions):
            if action.kind in _SEND_OF:
                send = send_of(action)
                link = lowered.worker_of(send.stage), worker
                due = sent[link][position[link]]
                if due != send:
                    raise ConfigError(
                        f"schedule {lowered.name}: {cell(worker, index, action)} takes the message of {send}, but the "
                        f"next one from worker {link[0]} is that of {due}; receive in the order of sending"
                    )
                position[link] += 1
