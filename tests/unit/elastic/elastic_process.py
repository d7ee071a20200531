"""What the small world is made of: a tape that decides, and workers that follow the protocol."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mlx_distributed.elastic.protocol import START, Event, Message, Outcome, Report, WorkerId
from mlx_distributed.elastic.worker import View


class Tape:
    """Choices, read from bytes; zeros after their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def done(self) -> bool:
        return self._at >= len(self._data)

    def draw(self, num: int) -> int:
        """One of 0..num-1."""
        byte = 0 if self.done else self._data[self._at]
        self._at += 1
        return byte % num


@dataclass
class Process:
    """A worker: what it knows, its state (the steps it has taken), and its streams."""

    view: View
    history: list[Outcome] = field(default_factory=list)
    num_checked: int = 0
    """Of the steps in `history`, by `World.check`."""
    serial: int = 0
    alive: bool = True
    stopped: bool = False
    connected: bool = False
    corrupt: bool = False
    """Its next gradient is wrong."""
    held: tuple[int, frozenset[int]] = (0, frozenset())
    """The step under way, and the micro-batches of it that are computed."""
    outbox: deque[Event] = field(default_factory=deque)
    inbox: deque[tuple[int, Message]] = field(default_factory=deque)

    @property
    def id(self) -> WorkerId:
        return self.view.worker

    @property
    def state(self) -> Outcome:
        return self.history[-1] if self.history else START

    def say(self) -> None:
        self.serial += 1
        if self.connected:
            self.outbox.append(Report(self.id, self.view.standing(self.serial)))
