"""How a worker gets the state of a run from others, who go on training meanwhile; `snapshots` is the other side.

All that comes from others is checked before memory is taken: the arrays must be those that this worker has itself, and
every slice must have the hash that was said of it, whoever sends it. The first fault of a source is its last.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from mlx_distributed.comm._pb import recovery_pb2 as pb
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.comm.grpc_streams import Channel, open_channel, read_bytes
from mlx_distributed.elastic import snapshots
from mlx_distributed.elastic.protocol import Outcome
from mlx_distributed.elastic.snapshots import MAX_BATCH, METHOD, Item, Slices, Snapshot, kind, outcome_from_pb

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity

STALL_S = 8.0
"""A source of which no message comes for so long is given up. Longer than `WAIT_S`, shorter than `LEASE_S`."""
LATE_S = 0.4
"""Of several sources, who has not answered so long after the others is left out: they can give it too."""
NUM_CALLS = 2
"""To each source at a time: while one answer is checked, the other is on its way."""
HASH_BYTES = 32

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""Dtypes and shapes of arrays, by name."""


class NotReceived(Exception):
    """The state could not be had from anybody; the text says why, source by source."""


@dataclass(frozen=True)
class Received:
    """What leads from the state that a worker has, or from none, to that of a newer step."""

    state: Snapshot | None
    """To begin with; None where the worker's own is good."""
    later: tuple[tuple[Outcome, Mapping[str, np.ndarray]], ...]
    """Reduced gradients of the steps that follow it, in order, as `StateServer.publish` was given them. That they have
    the digest of their outcome is for the caller to check."""
    faulty: frozenset[str] = frozenset()
    """Sources that were at fault or late: of others the next steps are had sooner."""


def layout_of(arrays: Mapping[str, np.ndarray]) -> Layout:
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


def fetch_state(
    endpoint: Endpoint,
    sources: Sequence[str],
    outcome: Outcome,
    mine: Snapshot,
    sums_layout: Callable[[int], Layout],
    token: str,
) -> Received:
    """Get the state after `outcome`, or after a later step. Blocks the calling thread.

    Where the last source is gone when a state, or some of the steps that follow, have come already, those are returned.

    Args:
        endpoint: of this worker, whose loop does the work and whose identity is shown.
        sources: addresses of the endpoints of others.
        outcome: of the newest step known.
        mine: what this worker has. If it is the state after its outcome, the steps that follow are enough where they
            are kept; whatever state comes must have the same arrays and counters.
        sums_layout: of the reduced gradients of a step, counted from 1, that a source says it has taken.
        token: secret of the run.

    Raises:
        NotReceived: nothing has come of anybody. Asking again may help: a newer snapshot is begun with then.
        CommError: the endpoint is closed.
    """
    future = endpoint.start(_fetch(endpoint.identity, sources, outcome, mine, sums_layout, token))
    try:
        return future.result()
    finally:
        future.cancel()


async def _fetch(
    identity: Identity | None,
    addresses: Sequence[str],
    outcome: Outcome,
    mine: Snapshot,
    sums_layout: Callable[[int], Layout],
    token: str,
) -> Received:
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(open_channel(address, identity, STALL_S)) for address in addresses]
        transfer = _Transfer([_Source(*each, token) for each in zip(addresses, channels, strict=True)], outcome)
        state, at = None, mine.outcome
        held = await transfer.hold(outcome.step)
        if not any(at in chain for chain in held.values()):
            state = await transfer.state(held, mine)
            at = state.outcome
            held = await transfer.hold()
        later: list[tuple[Outcome, Mapping[str, np.ndarray]]] = []
        try:
            while steps := max((_after(at, chain) for chain in held.values()), key=len, default=()):
                for at in steps:
                    sources = [source for source, chain in held.items() if at in chain]
                    layout = sums_layout(at.step)
                    later.append((at, (await transfer.get(Item(at, sums=True), sources, layout, ()))[1]))
                held = await transfer.hold()
        except NotReceived:
            if state is None and not later:
                raise  # Otherwise: the rest another time.
        return Received(state, tuple(later), transfer.faulty)


def _after(at: Outcome, chain: Sequence[Outcome]) -> Sequence[Outcome]:
    return chain[chain.index(at) + 1 :] if at in chain else ()


class _Fault(Exception):
    """Of a source: it is not asked again."""


class _Source:
    """A worker that may have what is wanted."""

    def __init__(self, address: str, channel: Channel, token: str) -> None:
        self.address, self._token = address, token
        self._get = channel.unary_stream(METHOD)

    @asynccontextmanager
    async def ask(self, request: pb.StateRequest) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        """Ask for something; what reads the messages of the answer. Whatever goes wrong is a `_Fault`."""
        request.token = self._token
        call = self._get(request.SerializeToString())

        async def read() -> bytes:
            async with asyncio.timeout(STALL_S):
                return await read_bytes(call.read)

        try:
            yield read
        except TimeoutError:
            raise _Fault(f"silent for {STALL_S:g} s") from None
        except (ConnectionError, DecodeError) as error:
            raise _Fault(str(error)) from None
        finally:
            call.cancel()

    async def hold(self, step: int) -> tuple[Outcome, ...]:
        """Have it keep a state; of that, and of the later steps that it keeps as well."""
        async with self.ask(pb.StateRequest(hold=step)) as read:
            return tuple(map(outcome_from_pb, (await _answer(read)).held))

    async def manifest(
        self, item: Item, layout: Layout, counters: Collection[str]
    ) -> tuple[dict[str, int], list[bytes]]:
        """The counters of an item and the hashes of its slices, if it is as expected."""
        num_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        num_hashes = -(-num_bytes // snapshots.SLICE_BYTES)
        async with self.ask(pb.StateRequest(manifest=item.to_pb())) as read:
            first = await _answer(read)
            if first.counters.keys() != set(counters):
                raise _Fault(f"it counts {sorted(first.counters)} there and {sorted(counters)} here")
            names: set[str] = set()
            while len(names) < first.num_arrays:
                arrays = (await _answer(read)).arrays
                if not arrays:
                    raise _Fault(f"it names {len(names)} of {first.num_arrays} arrays")
                for array in arrays:
                    expected = kind(*layout[array.name]) if array.name in layout else "missing"
                    if array.kind != expected or array.name in names:
                        raise _Fault(f"{array.name} is {array.kind} there and {expected} here")
                    names.add(array.name)
            if missing := min(layout.keys() - names, default=None):
                raise _Fault(f"{missing} is missing there and {kind(*layout[missing])} here")
            hashes: list[bytes] = []
            while len(hashes) < num_hashes:
                data = (await _answer(read)).hashes
                if not data or len(data) > HASH_BYTES * (num_hashes - len(hashes)):
                    raise _Fault(f"it has not the hashes of {num_hashes} slices")
                hashes += [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
            return dict(first.counters), hashes


class _Transfer:
    """What is had from several sources, of which fewer and fewer may be left.

    Args:
        sources: all of them.
        outcome: of the newest step known: what is had must be of its history.
    """

    def __init__(self, sources: Sequence[_Source], outcome: Outcome) -> None:
        self._live = list(sources)
        self._outcome = outcome
        self._faults: dict[str, str] = {}

    def failed(self) -> NotReceived:
        """Why it has failed."""
        reasons = "; ".join(f"{address}: {fault}" for address, fault in self._faults.items())
        return NotReceived(f"no state after step {self._outcome.step} could be had ({reasons or 'of nobody'})")

    @property
    def faulty(self) -> frozenset[str]:
        """Addresses of sources that are not asked any more."""
        return frozenset(self._faults)

    async def hold(self, step: int = 0) -> dict[_Source, tuple[Outcome, ...]]:
        """Have all sources keep what they have; who has not taken so many steps is given time to."""

        async def hold(source: _Source) -> tuple[Outcome, ...]:
            try:
                held = await source.hold(step)
                other = {each for each in held if each.step == self._outcome.step} - {self._outcome}
                if other:
                    raise _Fault(f"it has taken another step {self._outcome.step}")
                if any(after.step != before.step + 1 for before, after in itertools.pairwise(held)):
                    raise _Fault("the steps that it names do not follow each other")
            except _Fault as fault:
                self._drop(source, fault)
                return ()
            return held

        asked = {asyncio.create_task(hold(source)): source for source in self._live}
        await self._answers(asked)
        return {source: chain for task, source in asked.items() if not task.cancelled() and (chain := task.result())}

    async def state(self, held: Mapping[_Source, Sequence[Outcome]], mine: Snapshot) -> Snapshot:
        """The state that most of the sources have pinned. Raises NotReceived."""
        if not held:
            raise self.failed()
        counts = Counter(chain[0] for chain in held.values())
        outcome = max(counts, key=lambda each: (counts[each], each.step))
        sources = [source for source, chain in held.items() if chain[0] == outcome]
        layout = layout_of(mine.arrays)
        return Snapshot(outcome, *await self.get(Item(outcome, sums=False), sources, layout, mine.counters))

    async def get(
        self, item: Item, sources: Sequence[_Source], layout: Layout, counters: Collection[str]
    ) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """The counters and arrays of an item, from all of `sources` that are good. Raises NotReceived."""
        values, hashes = await self._manifest(item, sources, layout, counters)
        arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in layout.items()}
        slices, todo = Slices(arrays), deque(range(len(hashes)))
        while todo:
            live = [source for source in sources if source in self._live]
            if not live:
                raise self.failed()
            calls = ((self._draw(source, item, slices, hashes, todo), source) for source in live * NUM_CALLS)
            await self._answers({asyncio.create_task(call): source for call, source in calls})
        return values, arrays

    async def _manifest(
        self, item: Item, sources: Sequence[_Source], layout: Layout, counters: Collection[str]
    ) -> tuple[dict[str, int], list[bytes]]:
        for source in sources:
            if source in self._live:
                try:
                    return await source.manifest(item, layout, counters)
                except _Fault as fault:
                    self._drop(source, fault)
        raise self.failed()

    async def _draw(
        self, source: _Source, item: Item, slices: Slices, hashes: Sequence[bytes], todo: deque[int]
    ) -> None:
        """Get slices from one source, a few at a time, while there are any to be had, and it is good."""
        while todo and source in self._live:
            # Few when few are left: nobody shall wait long for the slowest source.
            num = max(1, min(MAX_BATCH, len(todo) // (2 * NUM_CALLS * len(self._live))))
            batch = deque(todo.popleft() for _ in range(num))
            request = pb.StateRequest(slices=pb.StateSlices(item=item.to_pb(), numbers=batch))
            try:
                async with source.ask(request) as read:
                    await _answer(read)
                    while batch:
                        number = batch[0]
                        if not await asyncio.to_thread(slices.put, number, await read(), hashes[number]):
                            raise _Fault(f"slice {number} of step {item.outcome.step} is damaged")
                        batch.popleft()
            except _Fault as fault:
                self._drop(source, fault)
            finally:
                todo.extendleft(reversed(batch))

    async def _answers(self, asked: Mapping[asyncio.Task[Any], _Source]) -> None:
        """Wait for what was asked of sources, but not for those that are late where others are done."""
        pending = set(asked)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=LATE_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                late = {asked[task] for task in pending}
                if not done and any(source in self._live for source in set(asked.values()) - late):
                    for source in late:
                        self._drop(source, _Fault(f"silent for {LATE_S:g} s after others were done"))
                    return
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def _drop(self, source: _Source, fault: _Fault) -> None:
        if source in self._live:
            self._live.remove(source)
            self._faults[source.address] = str(fault)


async def _answer(read: Callable[[], Awaitable[bytes]]) -> pb.StateAnswer:
    """The next message of an answer, where it is not a refusal."""
    answer = pb.StateAnswer.FromString(await read())
    if answer.refused:
        raise _Fault(f"refused: {answer.refused}")
    return answer
