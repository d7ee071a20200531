"""Waiting for something to happen, in one loop of asyncio."""

from __future__ import annotations

import asyncio


class Changes:
    """Whoever waits for a condition looks again after each change.

    Not an `asyncio.Event`: `wait_for` begins to wait for one only in a task of its own, and what happens until then,
    with another waiter clearing the event in between, would be missed.
    """

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something has happened: a frame, a loss, a call of ours."""
        for waiter in self._waiters:
            _wake(waiter)

    async def next(self, timeout_s: float | None) -> None:
        """Until something has happened, or the time is up; None waits for as long as it takes."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.add(waiter)
        timer = None if timeout_s is None else loop.call_later(timeout_s, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)
            if timer is not None:
                timer.cancel()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
