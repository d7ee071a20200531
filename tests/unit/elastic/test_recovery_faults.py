"""State is fetched from sources that lie, die or fall silent, by newcomers that are slow or should not come."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from elastic_recovery import (
    MINE,
    TOKEN,
    OnSlice,
    Trainer,
    assert_leads_to,
    fetch,
    newcomer,
    outcome_of,
    running,
    small_slices,
    state_after,
    sums_of,
)

from mlx_distributed.comm._pb import recovery_pb2 as pb
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.elastic import recovery, snapshots
from mlx_distributed.elastic.protocol import NOTHING
from mlx_distributed.elastic.recovery import NotReceived, fetch_state
from mlx_distributed.elastic.snapshots import MAX_BATCH, METHOD, Item, Snapshot, StateServer

__all__ = ["newcomer", "small_slices"]


def after(event: threading.Event) -> OnSlice:
    """Nothing is sent before."""

    async def wait(_: Trainer, data: bytes) -> bytes:
        await asyncio.to_thread(event.wait, 20)
        return data

    return wait


def at_fifth(what: Callable[[Trainer, bytes], bytes | None], event: threading.Event | None = None) -> OnSlice:
    """Do something to the fifth slice that a worker sends, and to all that follow."""

    async def do(trainer: Trainer, data: bytes) -> bytes | None:
        if trainer.num_slices < 5:
            return data
        if event is not None:
            event.set()
        return what(trainer, data)

    return do


def damage(_: Trainer, data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def cut_off(_: Trainer, data: bytes) -> bytes:
    return data[:-1]


def end(_: Trainer, data: bytes) -> None:
    return None


@pytest.mark.parametrize("fault", [damage, cut_off, end])
def test_a_source_at_fault_is_not_asked_again(
    newcomer: Endpoint, small_slices: None, fault: Callable[[Trainer, bytes], bytes | None]
) -> None:
    at_fault = threading.Event()
    good, bad = Trainer(4, on_slice=after(at_fault)), Trainer(4, on_slice=at_fifth(fault, at_fault))
    with running(good, bad):
        assert_leads_to(fetch(newcomer, [bad, good], 4), 4)
        assert bad.num_slices <= 4 + recovery.NUM_CALLS * MAX_BATCH


def test_a_source_that_dies_in_the_midst_is_replaced(newcomer: Endpoint, small_slices: None) -> None:
    dying, dead = threading.Event(), threading.Event()

    async def die(trainer: Trainer, data: bytes) -> bytes:
        if trainer.num_slices >= 5:
            dying.set()
            await asyncio.to_thread(dead.wait, 20)
        return data

    good, bad = Trainer(4, on_slice=after(dead)), Trainer(4, on_slice=die)

    def kill() -> None:
        dying.wait(20)
        threading.Timer(0, dead.set).start()
        bad.endpoint.close()

    killer = threading.Thread(target=kill)
    killer.start()
    with running(good, bad):
        assert_leads_to(fetch(newcomer, [bad, good], 4), 4)
        killer.join()


def test_when_the_last_is_gone_it_says_why(newcomer: Endpoint, small_slices: None) -> None:
    sources = [Trainer(4, on_slice=at_fifth(fault)) for fault in (damage, end)]
    gone = Trainer(4)
    gone.endpoint.close()
    with running(*sources):
        with pytest.raises(NotReceived, match="no state after step 4") as caught:
            fetch(newcomer, [*sources, gone], 4)
        for source in [*sources, gone]:
            assert source.address in str(caught.value)
        assert "is damaged" in str(caught.value)
        with pytest.raises(NotReceived, match="of nobody"):
            fetch(newcomer, [], 4)


def test_what_was_had_before_the_last_was_gone_is_good(newcomer: Endpoint) -> None:
    async def train_then_break_off(trainer: Trainer, data: bytes) -> bytes | None:
        trainer.train(2 if trainer.step == 4 else 0)
        return data if trainer.num_slices < 3 else None

    source = Trainer(4, on_slice=train_then_break_off)
    with running(source):
        assert_leads_to(fetch(newcomer, [source], 4), 5)
        with pytest.raises(NotReceived, match="the stream ended"):
            fetch(newcomer, [source], 6, state_after(5))


def test_a_silent_source_is_given_up(newcomer: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "STALL_S", 1.0)
    good = Trainer(4)
    with running(good), socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        received = fetch_state(newcomer, [address, good.address], outcome_of(4), MINE, lambda _: {}, TOKEN)
        assert_leads_to(received, 4)
        with pytest.raises(NotReceived, match=address):
            fetch_state(newcomer, [address], outcome_of(4), MINE, lambda _: {}, TOKEN)


@pytest.fixture
def impatient(newcomer: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """Who waits only for what others cannot give as well."""
    monkeypatch.setattr(recovery, "LATE_S", 0.2)
    return newcomer


def test_one_that_cannot_be_reached_holds_up_nobody_where_others_can(impatient: Endpoint) -> None:
    good = Trainer(4)
    with running(good), socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = [f"127.0.0.1:{silent.getsockname()[1]}", good.address]
        begun_s = time.monotonic()
        received = fetch_state(impatient, addresses, outcome_of(4), MINE, lambda _: {}, TOKEN)
        assert_leads_to(received, 4)
        assert received.faulty == {addresses[0]}
        assert time.monotonic() - begun_s < recovery.STALL_S / 2


def test_what_one_keeps_others_waiting_for_is_had_from_them(impatient: Endpoint, small_slices: None) -> None:
    over = threading.Event()

    async def stop(trainer: Trainer, data: bytes) -> bytes:
        if trainer.num_slices >= 5:
            await asyncio.to_thread(over.wait, 20)
        return data

    good, bad = Trainer(4), Trainer(4, on_slice=stop)
    with running(good, bad):
        begun_s = time.monotonic()
        assert_leads_to(fetch(impatient, [bad, good], 4), 4)
        assert time.monotonic() - begun_s < recovery.STALL_S / 2
        over.set()


def test_a_source_that_stalls_in_the_midst_is_given_up(
    newcomer: Endpoint, small_slices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "STALL_S", 1.0)
    over = threading.Event()
    source = Trainer(4, on_slice=after(over))
    with running(source):
        with pytest.raises(NotReceived, match="silent for 1 s"):
            fetch(newcomer, [source], 4)
        over.set()


def test_a_source_that_is_behind_is_not_waited_for_long(newcomer: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "WAIT_S", 0.05)
    behind, empty, good = Trainer(3), Trainer(0, publish=False), Trainer(4)
    with running(behind, empty, good):
        assert_leads_to(fetch(newcomer, [behind, empty, good], 4), 4)
        with pytest.raises(NotReceived, match="it has no state after step 4 yet"):
            fetch(newcomer, [behind, empty], 4)


def lapse(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "LEASE_S", 0.0)
        assert trainer.train() == [False]


def overflow(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "MAX_REPLAY_STEPS", 2)
        assert trainer.train(3) == [True] * 3, "steps are few, or small"
        patch.setattr(snapshots, "MAX_REPLAY_BYTES", 5 * snapshots.MIN_REPLAY_BYTES)
        assert trainer.train(3) == [True] * 3
        assert trainer.train() == [False]


def jump(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.step += 2
    trainer.server.publish(state_after(trainer.step), sums_of(trainer.step))


def withhold(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.step += 1
    trainer.server.publish(state_after(trainer.step))


@pytest.mark.parametrize("let_go", [lapse, overflow, jump, withhold])
def test_who_takes_too_long_begins_again(
    newcomer: Endpoint,
    small_slices: None,
    monkeypatch: pytest.MonkeyPatch,
    let_go: Callable[[Trainer, pytest.MonkeyPatch], None],
) -> None:
    def once(trainer: Trainer, data: bytes) -> bytes:
        if trainer.step == 4 and trainer.num_slices == 5:
            let_go(trainer, monkeypatch)
        return data

    source = Trainer(4, on_slice=at_fifth(once))
    with running(source):
        with pytest.raises(NotReceived, match=r"any more|the stream ended"):
            fetch(newcomer, [source], 4)
        assert source.step > 4
        assert_leads_to(fetch(newcomer, [source], 4), source.step)


def test_a_lease_that_nobody_renews_is_not_given_to_the_next(
    newcomer: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Trainer(4)
    with running(source):
        fetch(newcomer, [source], 4)
        assert source.train() == [True]
        monkeypatch.setattr(snapshots, "LEASE_S", 0.0)
        received = fetch(newcomer, [source], 4)
        assert received.state is not None
        assert received.state.outcome == outcome_of(5)


def test_a_newcomer_that_never_reads_holds_up_nobody(newcomer: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"w": np.ones((8, 1 << 18), np.float32)}
    kept = weakref.ref(arrays["w"])
    server, outcome = StateServer(TOKEN), outcome_of(4)
    server.publish(Snapshot(outcome, {}, arrays))
    mine = Snapshot(NOTHING, {}, {"w": np.zeros_like(arrays["w"])})
    sent = threading.Semaphore(0)

    async def count(data: bytes, context: object):  # type: ignore[no-untyped-def]
        async for message in server.handlers[METHOD](data, context):
            yield message
            sent.release()

    source = Endpoint(handlers={METHOD: count})
    fetch_state(newcomer, [source.address], outcome, mine, lambda _: {}, TOKEN)
    with grpc.insecure_channel(source.address) as channel:
        slices = pb.StateSlices(item=Item(outcome, sums=False).to_pb(), numbers=range(8))
        while sent.acquire(blocking=False):
            pass
        calls = [
            channel.unary_stream(METHOD)(pb.StateRequest(token=TOKEN, slices=slices).SerializeToString())
            for _ in range(4)
        ]
        assert sent.acquire(timeout=20)
        fetch_state(newcomer, [source.address], outcome, mine, lambda _: {}, TOKEN)
        monkeypatch.setattr(snapshots, "LEASE_S", 0.0)
        del arrays
        assert not server.release()
        gc.collect()
        assert kept() is None, "what nobody reads is let go"
        for call in calls:
            call.cancel()
    source.close()


def test_a_connection_that_takes_a_while_is_made(newcomer: Endpoint) -> None:
    """Longer than the collective, which dials again and again, gives an attempt."""
    source = Trainer(4)

    def relay(listener: socket.socket) -> None:
        near, _ = listener.accept()
        threading.Event().wait(0.3)  # The connection is a slow one.
        host, _, port = source.address.rpartition(":")
        far = socket.create_connection((host, int(port)))

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):  # The other side has closed both.
                while data := source.recv(1 << 16):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        back = threading.Thread(target=pump, args=(far, near))
        back.start()
        pump(near, far)
        back.join()
        near.close()
        far.close()

    with running(source), socket.create_server(("127.0.0.1", 0)) as listener:
        relaying = threading.Thread(target=relay, args=(listener,))
        relaying.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert_leads_to(fetch_state(newcomer, [address], outcome_of(4), MINE, lambda _: {}, TOKEN), 4)
        relaying.join()
