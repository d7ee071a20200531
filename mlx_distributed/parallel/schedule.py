"""`Schedule`: what every worker of a pipeline does in a step, and in which order, as data that is printed and read.

Terms:
    stage: a contiguous part of the model. Stage s is chunk s // num_workers of worker s % num_workers.
    F: forward pass of one micro-batch through one stage.
    B: backward pass: gradients of the stage's input, and of its weights too unless `split_backward`.
    W: gradients of the stage's weights, later, which nobody waits for.

Source:
    the notation is that of PyTorch's torch.distributed.pipelining, `2F0` for F of micro-batch 0 in stage 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from mlx_distributed.errors import ConfigError

Kind = Literal["F", "B", "W", "RECV_F", "SEND_F", "RECV_B", "SEND_B"]
"""RECV_F and SEND_F are of the activations that F takes and makes, RECV_B and SEND_B of the cotangents of B."""
COMPUTE: tuple[Kind, ...] = ("F", "B", "W")

_ACTION = re.compile(r"(\d+)(F|B|W|RECV_F|SEND_F|RECV_B|SEND_B)(\d+)", re.ASCII)
_HEADER = ("num_workers", "num_chunks", "num_microbatches", "split_backward", "in_flight")


class Action(NamedTuple):
    """One thing that a worker does, printed as `2F0`."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """The actions of one step. `validate` tells whether they are a schedule that can be run."""

    name: str
    """Of the kind of schedule: one word."""
    num_workers: int
    num_chunks: int
    """Stages of each worker."""
    num_microbatches: int
    split_backward: bool
    """Whether W is an action of its own."""
    in_flight: tuple[int, ...]
    """By worker, the most forward passes that are held for a backward pass at any time: begun, and B has not ended, nor
    W where the backward pass is split."""
    actions: tuple[tuple[Action, ...], ...]
    """By worker. F, B and W alone, or with messages between them (`lower`)."""

    @property
    def num_stages(self) -> int:
        return self.num_workers * self.num_chunks

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of computing that each micro-batch goes through in each stage, in order."""
        return COMPUTE if self.split_backward else COMPUTE[:2]

    @property
    def is_lowered(self) -> bool:
        """Whether there are messages among the actions."""
        return any(action.kind not in COMPUTE for actions in self.actions for action in actions)

    def worker_of(self, stage: int) -> int:
        return stage % self.num_workers

    def source(self, action: Action) -> Action | None:
        """Of an F or a B, the action of a neighbouring stage whose result it takes; None at the ends, and of a W."""
        return self._neighbour(action, -1)

    def target(self, action: Action) -> Action | None:
        """The inverse of `source`: the action of a neighbouring stage that takes its result."""
        return self._neighbour(action, 1)

    def _neighbour(self, action: Action, direction: int) -> Action | None:
        if action.kind == "W":
            return None
        stage = action.stage + (direction if action.kind == "F" else -direction)
        last = self.num_workers * self.num_chunks - 1
        return Action(action.kind, stage, action.microbatch) if 0 <= stage <= last else None

    def __str__(self) -> str:
        """A line that says what it is, and one line of actions per worker; `read` reads it."""
        values = (_to_text(getattr(self, name)) for name in _HEADER)
        header = " ".join(f"{name}={value}" for name, value in zip(_HEADER, values, strict=True))
        return "\n".join([f"{self.name} {header}", *(" ".join(map(str, actions)) for actions in self.actions)]) + "\n"

    @classmethod
    def read(cls, text: str) -> Schedule:
        """The inverse of `str`.

        Raises:
            ConfigError: the text is no schedule. Whether it can be run is for `validate` to say.
        """
        header, *lines = text.rstrip("\n").split("\n")
        name, *settings = header.split() or [""]
        values = dict(setting.partition("=")[::2] for setting in settings)
        if not name or tuple(values) != _HEADER:
            raise ConfigError(
                f"a schedule begins with its name and {', '.join(f'{key}=...' for key in _HEADER)}, in this order; its "
                f"first line is {header!r}"
            )
        numbers = {key: _number(key, values[key]) for key in _HEADER[:3]}
        if values["split_backward"] not in ("true", "false"):
            raise ConfigError(f"split_backward={values['split_backward']} of a schedule: write true or false")
        in_flight = tuple(_number("in_flight", value) for value in values["in_flight"].split(","))
        num_workers = numbers["num_workers"]
        if len(in_flight) != num_workers or len(lines) != num_workers:
            raise ConfigError(
                f"a schedule of {num_workers} workers needs a line of actions and a number in in_flight for each; "
                f"there are {len(lines)} lines and {len(in_flight)} numbers"
            )
        actions = tuple(_actions(worker, line) for worker, line in enumerate(lines))
        return cls(
            name, **numbers, split_backward=values["split_backward"] == "true", in_flight=in_flight, actions=actions
        )


def cell(worker: int, index: int, action: object) -> str:
    """How errors name one place of a schedule; workers and actions count from 0."""
    return f"worker {worker}, action {index} ({action})"


def _actions(worker: int, line: str) -> tuple[Action, ...]:
    actions = []
    for index, word in enumerate(line.split()):
        found = _ACTION.fullmatch(word)
        if found is None:
            raise ConfigError(
                f"{cell(worker, index, word)} of the schedule is no action: write the stage, one of F, B, W, RECV_F, "
                "SEND_F, RECV_B and SEND_B, and the micro-batch, as in 2F0"
            )
        actions.append(Action(cast(Kind, found[2]), int(found[1]), int(found[3])))
    return tuple(actions)


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigError(f"{name}={text} of a schedule: write whole numbers from 1 on")
    return int(text)


def _to_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower()
