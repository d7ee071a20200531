"""The coordinator and the workers' memberships, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from mlx_distributed.comm.tls import Identity
from mlx_distributed.elastic.coordinator import Coordinator
from mlx_distributed.elastic.journal import Journal
from mlx_distributed.elastic.membership import Membership
from mlx_distributed.elastic.messages import METHOD, SERVICE, TOKEN, arrival_to_pb
from mlx_distributed.elastic.protocol import (
    START,
    CommitRecord,
    End,
    Ended,
    EpochId,
    Facts,
    Hello,
    Outcome,
    Record,
    Refused,
    Standing,
    WorkerId,
)
from mlx_distributed.elastic.state import SILENCE_S, Rules
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import ConfigError, TrainingError

FACTS = Facts("run", "0.1.0", "config")
RULES = Rules(FACTS, num_steps=1000)
SECRET = "a secret"
PATIENCE_S = 20.0


@dataclass
class Running:
    """A coordinator in a thread of its own."""

    coordinator: Coordinator
    address: str
    loop: asyncio.AbstractEventLoop
    told: list[str]
    end: Future[End]


@contextmanager
def running(
    path: Path, rules: Rules = RULES, listen: str = "127.0.0.1:0", identity: Identity | None = None
) -> Iterator[Running]:
    journal, told = Journal(path), []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(coroutine: object) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)  # type: ignore[arg-type]

    try:
        coordinator = Coordinator(rules, journal, SECRET, told.append, identity)
        address = call(coordinator.start(listen)).result()
        end = call(coordinator.end())
        yield Running(coordinator, address, loop, told, end)
        end.cancel()
        call(coordinator.stop()).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        journal.close()


class Worker:
    """A worker that takes steps as soon as it may, when told to; its address refuses connections once it is killed."""

    def __init__(self, name: str, address: str, token: str = SECRET, facts: Facts = FACTS, **rest: object) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        mine = f"127.0.0.1:{self.listener.getsockname()[1]}"
        view = View(WorkerId(name, f"{name}-{id(self)}"), **rest)
        self.membership = Membership(address, token, facts, view, mine)

    def wait(self, condition: Callable[[View], object]) -> View:
        found = self.membership.wait(lambda view: view if condition(view) else None, PATIENCE_S)
        assert found is not None, self.membership.view
        return found

    def sees(self, *names: str) -> View:
        """Wait for an epoch of these."""
        return self.wait(lambda v: v.epoch is not None and [seat.worker.name for seat in v.epoch.seats] == list(names))

    def vote(self, digest: str = "d") -> None:
        epoch = self.membership.view.epoch
        assert epoch is not None
        self.membership.change(lambda view: view.prepare(epoch.id, digest))

    def takes(self, step: int) -> View:
        return self.wait(lambda view: view.committed.step == step)

    def leave(self) -> None:
        self.membership.close("done")
        self.listener.close()


@contextmanager
def workers(address: str, *names: str) -> Iterator[list[Worker]]:
    """Workers that have entered an epoch together, one after the other."""
    found: list[Worker] = []
    try:
        for name in names:
            found.append(Worker(name, address))
            found[-1].sees(*[worker.membership.view.worker.name for worker in found])
        for worker in found:
            worker.sees(*names)
        yield found
    finally:
        for worker in found:
            worker.leave()


def commits(path: Path) -> list[Record]:
    journal = Journal(path)
    journal.close()
    return [record for record in journal.records if isinstance(record, CommitRecord)]


def test_three_workers_vote_and_take_steps_together(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a", "b", "c") as group:
        for step in (1, 2, 3):
            for worker in group:
                worker.vote(f"d{step}")
            assert {worker.takes(step).committed for worker in group} == {Outcome(step, f"d{step}")}
    assert [record.outcome.step for record in commits(tmp_path / "journal")] == [1, 2, 3]


def test_over_tls_with_the_identity_of_the_run(tmp_path: Path) -> None:
    identity = Identity.create(datetime.now(UTC))
    with running(tmp_path / "journal", identity=identity) as run:
        membership = Membership(run.address, SECRET, FACTS, View(WorkerId("a", "1")), "127.0.0.1:1", identity)
        assert membership.wait(lambda view: view.epoch, PATIENCE_S) is not None
        membership.close("done")
        assert membership.away_s > 0


VICTIM = """
import socket, sys, time
from mlx_distributed.elastic.membership import Membership
from mlx_distributed.elastic.protocol import Facts, WorkerId
from mlx_distributed.elastic.worker import View
listener = socket.create_server(("127.0.0.1", 0))
facts, view = Facts("run", "0.1.0", "config"), View(WorkerId("victim", "1"))
membership = Membership(sys.argv[1], "a secret", facts, view, "127.0.0.1:%d" % listener.getsockname()[1])
time.sleep(600)
"""


@contextmanager
def victim(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", VICTIM, address])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_one_that_is_killed_is_found_out_at_once_and_the_others_try_again(tmp_path: Path) -> None:
    """Its stream ends and its port is closed: no heartbeat is waited for."""
    with running(tmp_path / "journal") as run, workers(run.address, "a", "b") as (a, b), victim(run.address) as process:
        a.sees("a", "b", "victim")
        b.sees("a", "b", "victim")
        a.vote()
        killed_s = time.monotonic()
        process.kill()
        epoch = a.sees("a", "b").epoch
        assert time.monotonic() - killed_s < SILENCE_S
        assert epoch is not None
        assert epoch.reason == "victim is out: nobody answers at its address any more"
        b.sees("a", "b")
        for worker in (a, b):
            worker.vote("again")
        assert a.takes(1).committed == Outcome(1, "again")
        b.takes(1)
        late = Worker("late", run.address)
        offer = late.wait(lambda view: view.offer).offer
        assert offer is not None
        late.membership.change(lambda view: view.fetched(offer.outcome))
        a.sees("a", "b", "late")
        late.leave()


def test_one_that_is_stopped_is_given_up_after_three_seconds_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a") as (a,), victim(run.address) as process:
        a.sees("a", "victim")
        process.send_signal(signal.SIGSTOP)
        a.vote()
        epoch = a.sees("a").epoch
        assert epoch is not None
        assert epoch.reason.startswith("victim is out: it was silent for 3.")
        process.send_signal(signal.SIGCONT)
        a.sees("a", "victim")


def test_one_that_leaves_for_a_while_is_not_waited_for_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a", "b") as (a, b):
        a.vote()
        left_s = time.monotonic()
        b.membership.leave("it sleeps")
        assert (b.membership.view.epoch, b.membership.view.out) == (None, "it sleeps")
        epoch = a.sees("a").epoch
        assert time.monotonic() - left_s < 1.0
        assert epoch is not None
        assert epoch.reason == "b has left (it sleeps)"
        a.vote("again")
        a.takes(1)
        assert b.membership.view.offer is None
        b.membership.come_back()
        offer = b.wait(lambda view: view.offer).offer
        assert offer is not None
        b.membership.change(lambda view: view.fetched(offer.outcome))
        a.sees("a", "b")
        b.sees("a", "b")


def test_what_it_had_voted_for_when_it_left_is_taken_when_it_is_back(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a", "b") as (a, b):
        b.vote()
        b.membership.leave("it sleeps")
        a.sees("a")
        a.vote()
        a.takes(1)
        b.membership.come_back()
        assert b.takes(1).offer is None
        b.sees("a", "b")


def break_stream(run: Running, worker: Worker) -> None:
    """As a cable that is pulled and put in again; the worker dials anew."""
    queue = run.coordinator._streams[worker.membership.view.worker]
    run.loop.call_soon_threadsafe(queue.put_nowait, None)


def test_one_whose_stream_breaks_comes_back_into_the_same_epoch(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a", "b") as (a, b):
        before = a.membership.view.epoch
        break_stream(run, b)
        a.vote()
        b.vote()
        assert a.takes(1).epoch == replace(before, committed=Outcome(1, "d"))


def test_the_coordinator_comes_back_and_the_step_that_was_prepared_is_taken(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a", "b") as (a, b):
        a.vote()
        b.vote()
        a.takes(1)
        b.takes(1)
        asyncio.run_coroutine_threadsafe(run.coordinator.stop(), run.loop).result()
        run.coordinator._journal.close()
        a.vote("e")
        b.vote("e")
        with running(tmp_path / "journal", listen=run.address) as run_2:
            assert a.takes(2).term == 2
            assert b.takes(2).newest == EpochId(1, 2), "the epoch outlives the coordinator"
            assert run_2.coordinator.state.term == 2
            a.membership.close("done")
            b.membership.close("done")


def test_the_run_ends_when_all_have_left_after_the_last_step(tmp_path: Path) -> None:
    with running(tmp_path / "journal", replace(RULES, num_steps=1)) as run:
        with workers(run.address, "a", "b") as group:
            for worker in group:
                worker.vote()
            for worker in group:
                worker.takes(1)
        assert run.end.result(PATIENCE_S) == End("all steps are taken", failed=False)
        late = Worker("late", run.address)
        assert late.wait(lambda view: view.ended).ended == Refused("this run is over: all steps are taken")
        late.leave()


def test_too_few_give_up_and_say_so(tmp_path: Path) -> None:
    rules = replace(RULES, min_workers=2, wait_s=0.5)
    with running(tmp_path / "journal", rules) as run:
        alone = Worker("alone", run.address)
        ended = alone.wait(lambda view: view.ended).ended
        reason = "gave up after 0.5 s: 1 of at least 2 workers are ready to train (alone); waiting for more"
        assert ended == Ended(reason, failed=True)
        assert run.end.result(PATIENCE_S) == End(reason, failed=True)
        assert reason in run.told
        alone.leave()


def test_without_the_token_nothing_is_read(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run:
        stranger = Worker("stranger", run.address, token="a guess")
        assert stranger.wait(lambda view: view.ended).ended == Refused(
            f"{run.address}: the token is not that of this run"
        )
        stranger.leave()
        assert run.coordinator.state.members == {}


def test_another_configuration_is_refused_in_words(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run:
        other = Worker("other", run.address, facts=FACTS._replace(config_digest="changed"))
        ended = other.wait(lambda view: view.ended).ended
        assert isinstance(ended, Refused)
        assert ended.reason.startswith("other has configuration changed, and this run has config")
        other.leave()


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x12\x00"])
def test_what_is_not_a_hello_is_refused(tmp_path: Path, data: bytes) -> None:
    with running(tmp_path / "journal") as run, grpc.insecure_channel(run.address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([data]), metadata=((TOKEN, SECRET),))
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_stream_that_makes_no_sense_is_ended(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, grpc.insecure_channel(run.address) as channel:
        hello = Hello(WorkerId("a", "1"), "nowhere", FACTS, Standing(1, START))
        words = [arrival_to_pb(hello).SerializeToString(), b"\xff\xff"]
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(words), metadata=((TOKEN, SECRET),))
        assert len(list(call)) <= 1


def test_a_worker_leaves_though_there_is_no_coordinator() -> None:
    alone = Worker("alone", "127.0.0.1:1")
    alone.leave()
    assert alone.membership.away_s > 0


def test_a_port_that_is_in_use_is_refused(tmp_path: Path) -> None:
    with (
        running(tmp_path / "journal") as run,
        pytest.raises(ConfigError, match="is the port in use"),
        running(tmp_path / "other", listen=run.address),
    ):
        pass


def test_a_full_disk_ends_the_coordinator_before_anything_is_told(tmp_path: Path) -> None:
    with running(tmp_path / "journal") as run, workers(run.address, "a") as (a,):
        with (Path("/dev") / "full").open("wb") as full:
            os.dup2(full.fileno(), run.coordinator._journal._file.fileno())
        a.vote()
        with pytest.raises(TrainingError, match="cannot be written"):
            run.end.result(PATIENCE_S)
        assert a.membership.view.committed.step == 0
