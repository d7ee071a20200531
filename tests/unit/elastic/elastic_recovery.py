"""Workers that train by adding numbers, and give their state to others over real endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from mlx_distributed.comm._pb import recovery_pb2 as pb
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.tls import Identity
from mlx_distributed.elastic import recovery, snapshots
from mlx_distributed.elastic.protocol import NOTHING, START, Outcome
from mlx_distributed.elastic.recovery import Layout, Received, fetch_state, layout_of
from mlx_distributed.elastic.snapshots import METHOD, Snapshot, StateServer

TOKEN = "a secret"
Arrays = Mapping[str, np.ndarray]
OnSlice = Callable[["Trainer", bytes], Awaitable[bytes | None]]
"""What a worker sends in place of a slice; None ends the answer."""


def outcome_of(step: int) -> Outcome:
    return Outcome(step, f"digest of {step}") if step else START


def sums_of(step: int) -> Arrays:
    """The reduced gradients of a step."""
    rng = np.random.default_rng(step)
    return {"w": rng.standard_normal((70, 31), np.float32), "b": np.array([step, -step], np.int32)}


def sums_layout(step: int) -> Layout:
    return layout_of(sums_of(step))


def added(arrays: Arrays, sums: Arrays) -> Arrays:
    return {name: array + sums[name] for name, array in arrays.items()}


def state_after(step: int) -> Snapshot:
    """What every worker has that has taken so many steps."""
    arrays: Arrays = {"w": np.zeros((70, 31), np.float32), "b": np.zeros(2, np.int32)}
    for each in range(1, step + 1):
        arrays = added(arrays, sums_of(each))
    return Snapshot(outcome_of(step), {"num_tokens": 10 * step}, arrays)


MINE = Snapshot(NOTHING, {"num_tokens": 0}, state_after(0).arrays)
"""Of a newcomer."""


class Trainer:
    """A worker that has taken some steps, and what happens to the slices that it sends."""

    def __init__(
        self, step: int, identity: Identity | None = None, on_slice: OnSlice | None = None, publish: bool = True
    ) -> None:
        self.server, self.step, self._on_slice = StateServer(TOKEN), step, on_slice
        self.num_calls = self.num_slices = 0
        if publish:
            self.server.publish(state_after(step))
        self.endpoint = Endpoint(identity=identity, handlers={METHOD: self._answer})

    @property
    def address(self) -> str:
        return self.endpoint.address

    def train(self, num_steps: int = 1) -> list[bool]:
        """Take steps; for each, whether its gradients were kept."""
        kept = []
        for _ in range(num_steps):
            self.step += 1
            kept.append(self.server.release())
            self.server.publish(state_after(self.step), sums_of(self.step) if kept[-1] else None)
        return kept

    async def _answer(self, data: bytes, context: object) -> AsyncIterator[bytes]:
        self.num_calls += 1
        slices = pb.StateRequest.FromString(data).WhichOneof("what") == "slices"
        first = True
        async for message in self.server.handlers[METHOD](data, context):
            answer: bytes | None = message
            if slices and not first:
                self.num_slices += 1
                if self._on_slice is not None:
                    answer = await self._on_slice(self, message)
            first = False
            if answer is None:
                return
            yield answer


@contextmanager
def running(*trainers: Trainer) -> Iterator[None]:
    with ExitStack() as stack:
        for each in trainers:
            stack.callback(each.endpoint.close)
        yield


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(recovery, "LATE_S", 20.0)  # Nobody is left out because the machine is busy.
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a state of a few kilobytes has many."""
    monkeypatch.setattr(snapshots, "SLICE_BYTES", 100)


def fetch(
    newcomer: Endpoint,
    sources: Sequence[Trainer],
    step: int,
    mine: Snapshot = MINE,
    token: str = TOKEN,
) -> Received:
    return fetch_state(newcomer, [each.address for each in sources], outcome_of(step), mine, sums_layout, token)


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Names, dtypes, shapes and bits."""
    assert layout_of(found) == layout_of(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def assert_leads_to(received: Received, step: int, mine: Snapshot = MINE) -> None:
    """What was received gives the bits of somebody who was there all the time."""
    state = received.state or mine
    outcome, arrays = state.outcome, state.arrays
    for later, sums in received.later:
        assert later == outcome_of(outcome.step + 1)
        outcome, arrays = later, added(arrays, sums)
    assert outcome == outcome_of(step)
    assert_same(arrays, state_after(step).arrays)
