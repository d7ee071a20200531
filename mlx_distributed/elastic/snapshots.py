"""The state of a worker as others can have it: in slices, while it goes on training.

MLX arrays never change, so who keeps references to them has a snapshot: nothing is copied or hashed before somebody
asks. What has been asked for is pinned, and the reduced gradients of the steps that follow are kept with it: applied to
the snapshot they give the state of now, bit for bit, so nobody has to wait for a newcomer.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import hmac
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from mlx_distributed.comm._pb import membership_pb2
from mlx_distributed.comm._pb import recovery_pb2 as pb
from mlx_distributed.elastic.protocol import NOTHING, Outcome

METHOD = "/mlx_distributed.v1.State/Get"

SLICE_BYTES = 1 << 20
"""What is hashed, and sent in a message of its own."""
MAX_BATCH = 8
"""Slices in one request."""
MAX_CALLS = 16
"""Answers with slices or hashes at a time."""
LEASE_S = 10.0
"""A pinned snapshot is let go when nobody has read of it for so long."""
WAIT_S = 3.0
"""A step that others have taken is waited for so long."""
POLL_S = 0.005
MAX_REPLAY_STEPS, MAX_REPLAY_BYTES = 8, 256 << 20
"""Gradients of later steps are kept while they are so few, or take so little; then the newcomer must begin again."""
MIN_REPLAY_BYTES = 64 << 10
"""Gradients of a step count as so much at least."""
_PIECE = 256
"""Arrays, or hashes, in one message."""

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """The state after a step."""

    outcome: Outcome
    counters: Mapping[str, int]
    arrays: Mapping[str, np.ndarray]
    """By name; of any dtypes and shapes. Nobody may write to them any more."""


class Item(NamedTuple):
    """Arrays that can be asked for."""

    outcome: Outcome
    sums: bool
    """Those are the reduced gradients of the step, else the state after it."""

    def to_pb(self) -> pb.StateItem:
        return pb.StateItem(outcome=outcome_to_pb(self.outcome), sums=self.sums)

    @classmethod
    def from_pb(cls, item: pb.StateItem) -> Item:
        return cls(outcome_from_pb(item.outcome), item.sums)


def outcome_to_pb(outcome: Outcome) -> membership_pb2.Outcome:
    return membership_pb2.Outcome(step=outcome.step, digest=outcome.digest)


def outcome_from_pb(outcome: membership_pb2.Outcome) -> Outcome:
    return Outcome(outcome.step, outcome.digest)


def kind(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    """As in float32[2, 3]."""
    return f"{dtype.name}{list(shape)}"


class Slices:
    """Arrays, one after the other by name, as one run of bytes that is cut into slices of `SLICE_BYTES`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._views = [arrays[name].reshape(-1).view(np.uint8).data for name in sorted(arrays) if arrays[name].size]
        self._edges = [0, *itertools.accumulate(len(view) for view in self._views)]

    def __len__(self) -> int:
        return -(-self._edges[-1] // SLICE_BYTES)

    def get(self, number: int) -> bytes:
        """The bytes of a slice."""
        return b"".join(self._pieces(number))

    def put(self, number: int, data: bytes, sha256: bytes) -> bool:
        """Write a slice into the arrays; False, with nothing written, where the data are not those of the hash."""
        pieces = self._pieces(number)
        if len(data) != sum(map(len, pieces)) or hashlib.sha256(data).digest() != sha256:
            return False
        at = 0
        for piece in pieces:
            piece[:] = memoryview(data)[at : at + len(piece)]
            at += len(piece)
        return True

    def _pieces(self, number: int) -> list[memoryview]:
        start = number * SLICE_BYTES
        stop = min(start + SLICE_BYTES, self._edges[-1])
        first = bisect.bisect_right(self._edges, start) - 1
        pieces = []
        for view, edge in zip(self._views[first:], self._edges[first:], strict=False):
            if edge >= stop:
                break
            pieces.append(view[max(start - edge, 0) : stop - edge])
        return pieces


class _Bundle:
    """Arrays that are kept for others, with the hashes of their slices from the first time that somebody asks."""

    def __init__(self, arrays: Mapping[str, np.ndarray], counters: Mapping[str, int]) -> None:
        self.arrays, self.counters = arrays, counters
        self._hashes: list[bytes] = []
        self._hashing = asyncio.Lock()

    @cached_property
    def slices(self) -> Slices:
        return Slices(self.arrays)

    async def hashes(self, first: int) -> list[bytes]:
        """Of a piece of the slices, all before which have been asked for."""
        async with self._hashing:
            if len(self._hashes) == first:
                self._hashes += await asyncio.to_thread(self._hash, first)
        return self._hashes[first : first + _PIECE]

    def _hash(self, first: int) -> list[bytes]:
        stop = min(first + _PIECE, len(self.slices))
        return [hashlib.sha256(self.slices.get(number)).digest() for number in range(first, stop)]


@dataclass
class _Pin:
    """A snapshot that somebody has begun to fetch, and the gradients of the steps after it."""

    bundles: dict[Item, _Bundle]
    """Emptied when it is let go: an answer that nobody reads must not keep arrays alive."""
    outcomes: list[Outcome]
    renewed_s: float
    num_replay_bytes: int = 0
    num_calls: int = 0


class _Refused(Exception):
    """A request is not answered; the text is told to whoever made it."""


class StateServer:
    """Gives the state of this worker to others that know the secret of the run.

    One thread trains and calls `release` and `publish`; everything else runs in the loop of one endpoint, which is
    given `handlers`.

    Args:
        token: secret of the run.
    """

    def __init__(self, token: str) -> None:
        assert token
        self.handlers = {METHOD: self._answer}
        self._token = token.encode()
        self._lock = threading.Lock()
        # All below is written with the lock, and so is what a pin holds; its counters, by the loop alone.
        self._outcome = NOTHING
        """Of what was published last."""
        self._newest: Snapshot | None = None
        self._pin: _Pin | None = None

    def release(self) -> bool:
        """The state is about to change: nothing of it is kept unless somebody is fetching it.

        Returns:
            Whether somebody is: then `publish` wants the reduced gradients of the step.
        """
        with self._lock:
            self._newest = None
            if self._pin is not None and self._lapsed(self._pin):
                self._let_go()
            return self._pin is not None

    def publish(self, snapshot: Snapshot, sums: Mapping[str, np.ndarray] | None = None) -> None:
        """From now on this is the state that others get. Takes references alone.

        Args:
            snapshot: the state after a commit, or that was fetched or loaded.
            sums: reduced gradients of the step that has led to it from what was published before, as they were before
                anything was computed from them. Without them, who is fetching an earlier state must begin again.
        """
        with self._lock:
            pin = self._pin
            if pin is not None:
                if sums is None or snapshot.outcome.step != self._outcome.step + 1 or self._lapsed(pin):
                    self._let_go()
                else:
                    pin.bundles[Item(snapshot.outcome, sums=True)] = _Bundle(sums, {})
                    pin.outcomes.append(snapshot.outcome)
                    pin.num_replay_bytes += max(sum(array.nbytes for array in sums.values()), MIN_REPLAY_BYTES)
                    if len(pin.outcomes) - 1 > MAX_REPLAY_STEPS and pin.num_replay_bytes > MAX_REPLAY_BYTES:
                        self._let_go()
            self._newest, self._outcome = snapshot, snapshot.outcome

    def _lapsed(self, pin: _Pin) -> bool:
        return time.monotonic() - pin.renewed_s > LEASE_S

    def _let_go(self) -> None:
        assert self._pin is not None
        self._pin.bundles.clear()
        self._pin = None

    # Everything below runs in the loop of the endpoint.

    async def _answer(self, data: bytes, _: object) -> AsyncIterator[bytes]:
        try:
            request = pb.StateRequest.FromString(data)
        except DecodeError:
            request = pb.StateRequest()
        try:
            if not hmac.compare_digest(request.token.encode(), self._token):
                raise _Refused("the token is not that of this run")
            match request.WhichOneof("what"):
                case "hold":
                    yield (await self._soon(request.hold, self._held)).SerializeToString()
                case "manifest":
                    async for answer in self._manifest(Item.from_pb(request.manifest)):
                        yield answer.SerializeToString()
                case "slices":
                    item = Item.from_pb(request.slices.item)
                    async for message in self._slices(item, request.slices.numbers):
                        yield message
                case _:
                    raise _Refused("the request is none that is known here")
        except _Refused as refused:
            yield pb.StateAnswer(refused=str(refused)).SerializeToString()

    async def _soon(self, step: int, attempt: Callable[[], T | None]) -> T:
        """What `attempt` gives when so many steps have been published here, as soon as it gives something.

        Looks again and again, as long as a newcomer waits: the thread that publishes knows no loops.
        """
        deadline_s = time.monotonic() + WAIT_S
        while True:
            if self._outcome.step >= step and (found := attempt()) is not None:
                return found
            if time.monotonic() > deadline_s:
                raise _Refused(f"it has no state after step {step} yet")
            await asyncio.sleep(POLL_S)

    def _held(self) -> pb.StateAnswer | None:
        """What is pinned, and if nothing is, the newest state from now on; None while that is about to change."""
        with self._lock:
            newest = self._newest
            if newest is not None and self._pin is not None and self._lapsed(self._pin):
                self._let_go()
            if newest is not None and self._pin is None:
                bundles = {Item(newest.outcome, sums=False): _Bundle(newest.arrays, newest.counters)}
                self._pin = _Pin(bundles, [newest.outcome], time.monotonic())
            if self._pin is None:
                return None
            self._pin.renewed_s = time.monotonic()
            return pb.StateAnswer(held=map(outcome_to_pb, self._pin.outcomes))

    async def _manifest(self, item: Item) -> AsyncIterator[pb.StateAnswer]:
        pin = await self._soon(item.outcome.step, lambda: self._begin(item))
        try:
            bundle = self._bundle(pin, item)
            kinds = [
                pb.StateArray(name=name, kind=kind(array.dtype, array.shape))
                for name, array in sorted(bundle.arrays.items())
            ]
            first_answer = pb.StateAnswer(counters=bundle.counters, num_arrays=len(kinds))
            num_slices = len(bundle.slices)
            del bundle
            yield first_answer
            for first in range(0, len(kinds), _PIECE):
                yield pb.StateAnswer(arrays=kinds[first : first + _PIECE])
            for first in range(0, num_slices, _PIECE):
                yield pb.StateAnswer(hashes=b"".join(await self._bundle(pin, item).hashes(first)))
        finally:
            pin.num_calls -= 1

    async def _slices(self, item: Item, numbers: Sequence[int]) -> AsyncIterator[bytes]:
        pin = await self._soon(item.outcome.step, lambda: self._begin(item))
        try:
            num_slices = len(self._bundle(pin, item).slices)
            if len(numbers) > MAX_BATCH or any(number >= num_slices for number in numbers):
                raise _Refused(f"there are {num_slices} slices, and at most {MAX_BATCH} are sent at a time")
            yield pb.StateAnswer().SerializeToString()
            for number in numbers:
                try:
                    data = self._bundle(pin, item).slices.get(number)
                except _Refused:
                    return  # After the first message, a refusal would be taken for a slice.
                yield data
        finally:
            pin.num_calls -= 1

    def _begin(self, item: Item) -> _Pin:
        """An answer that takes time; `num_calls` must be lowered at its end."""
        pin = self._pin
        if pin is None or item not in pin.bundles:
            raise _Refused(f"it does not keep what was at step {item.outcome.step} any more")
        if pin.num_calls >= MAX_CALLS:
            raise _Refused("too many workers fetch its state at a time")
        pin.num_calls += 1
        return pin

    def _bundle(self, pin: _Pin, item: Item) -> _Bundle:
        """Of a pin that is in use. Not to be kept in a variable while an answer is on its way."""
        bundle = pin.bundles.get(item)
        if bundle is None:
            raise _Refused("it does not keep that state any more")
        pin.renewed_s = time.monotonic()
        return bundle
