"""Groups of one generation after the other at the same addresses, one thread per worker."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

import grpc
import grpc.aio
import mlx.core as mx
import numpy as np
import pytest

from mlx_distributed.comm import endpoint as endpoint_module
from mlx_distributed.comm.base import LocalComm, Parts, add_buckets
from mlx_distributed.comm.buckets import BucketLayout, make_layout, to_buckets
from mlx_distributed.comm.endpoint import MAX_STRANGERS, Endpoint
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.grpc_streams import EXCHANGE
from mlx_distributed.comm.hello import Membership
from mlx_distributed.comm.session import LINGER_S
from mlx_distributed.comm.tls import Identity
from mlx_distributed.comm.tree_sum import TreeSum
from mlx_distributed.errors import CommError

T = TypeVar("T")
NUM_LEAVES, WHAT, LAST = 6, "a test", 2**63 - 1


@contextmanager
def endpoints(names: str, identity: Identity | None = None) -> Iterator[dict[str, Endpoint]]:
    """One for each worker, whose name is a letter."""
    opened = {name: Endpoint(identity=identity) for name in names}
    try:
        yield opened
    finally:
        for each in opened.values():
            each.close()


def at_once(bodies: Mapping[str, Callable[[], T]]) -> dict[str, T | BaseException]:
    """What each body returns, or the exception that ended it."""
    results: dict[str, T | BaseException] = {}

    def be(name: str, body: Callable[[], T]) -> None:
        try:
            results[name] = body()
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            results[name] = error

    threads = [threading.Thread(target=be, args=each) for each in bodies.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def enter(members: str, name: str, ends: Mapping[str, Endpoint], generation: int, timeout_s: float = 20.0) -> GrpcComm:
    """Become a member of the group of a generation."""
    comm = GrpcComm(members.index(name), len(members), "run", generation, timeout_s, endpoint=ends[name])
    try:
        comm.connect([ends[member].address for member in members])
    except CommError as error:
        comm.close(error)
        raise
    return comm


def parts_of(rank: int, size: int) -> tuple[tuple[BucketLayout, ...], list[Parts]]:
    """Several buckets of random leaves, and the partial sums of them that a rank holds."""
    rng = np.random.default_rng(0)
    leaves = [
        {name: mx.array(rng.standard_normal((400, 301), np.float32)) for name in "abc"} for _ in range(NUM_LEAVES)
    ]
    layout = make_layout(leaves[0], bucket_bytes=1 << 18)
    trees = [TreeSum(NUM_LEAVES, add_buckets) for _ in layout]
    for i in range(rank * NUM_LEAVES // size, (rank + 1) * NUM_LEAVES // size):
        for tree, bucket in zip(trees, to_buckets(layout, leaves[i]), strict=True):
            tree.put((i, i + 1), bucket)
    return layout, [tree.parts for tree in trees]


def to_bytes(sums: Sequence[Sequence[mx.array]]) -> list[bytes]:
    return [np.asarray(array).tobytes() for bucket in sums for array in bucket]


def reduce(comm: GrpcComm | LocalComm, before: Callable[[int], object] = lambda _: None) -> list[bytes]:
    """The bytes of a sum that is the same for every group; `before` is called before each bucket, with its number."""
    layout, held = parts_of(comm.rank, comm.size)

    def buckets() -> Iterator[Parts]:
        for index, parts in enumerate(held):
            before(index)
            yield parts

    return to_bytes(comm.all_reduce(layout, NUM_LEAVES, buckets(), WHAT))


def alone() -> list[bytes]:
    return reduce(LocalComm())


@pytest.mark.parametrize("over_tls", [False, True])
def test_groups_of_other_members_and_ranks_follow_each_other(over_tls: bool) -> None:
    """In peace, though some are in the next group while others still leave the one before."""
    generations = {0: "abc", 1: "cb", 7: "bac", LAST: "a"}
    identity = Identity.create(datetime.now(UTC)) if over_tls else None
    with endpoints("abc", identity) as ends:

        def live(name: str) -> list[list[bytes]]:
            sums = []
            for generation, members in generations.items():
                if name in members:
                    comm = enter(members, name, ends, generation)
                    assert comm.address == ends[name].address
                    sums += [reduce(comm), reduce(comm)]
                    comm.close()
            return sums

        found = at_once({name: lambda name=name: live(name) for name in "abc"})
    assert found == {"a": [alone()] * 6, "b": [alone()] * 6, "c": [alone()] * 6}


@pytest.mark.parametrize("late", ["a", "b"])
def test_who_enters_late_is_waited_for(late: str) -> None:
    """The others dial it, and it finds them at its door; or they wait for its call."""
    begun = threading.Event()
    with endpoints("ab") as ends:

        def live(name: str) -> list[bytes]:
            if name == late:
                assert begun.wait(20)
            else:
                # Not in the constructor: it would be the dialling itself that is to be waited for.
                threading.Timer(0.3, begun.set).start()
            comm = enter("ab", name, ends, 5)
            sums = reduce(comm)
            comm.close()
            return sums

        assert at_once({name: lambda name=name: live(name) for name in "ab"}) == dict.fromkeys("ab", alone())


def test_who_is_waited_for_too_long_is_dialled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "HELLO_S", 0.05)
    with endpoints("ab") as ends:
        found = {}
        first = threading.Thread(target=lambda: found.update(at_once({"a": lambda: enter("ab", "a", ends, 1)})))
        first.start()
        with pytest.raises(grpc.RpcError) as caught:
            knock(ends["b"], Membership("run", 1, 0, 2))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        second = enter("ab", "b", ends, 1)
        first.join()
        assert isinstance(found["a"], GrpcComm)
        at_once({"a": found["a"].close, "b": second.close})


@pytest.mark.parametrize("victim", "abc")
def test_a_worker_dies_and_the_others_form_the_next_group_right_away(victim: str) -> None:
    with endpoints("abc") as ends:
        entered_s: list[float] = []

        def live(name: str) -> tuple[int | None, list[bytes]]:
            comm = enter("abc", name, ends, 1)
            comm.barrier("the start")

            def die(index: int) -> None:
                if index == 2 and name == victim:
                    ends[name].close()

            with pytest.raises(CommError) as caught:
                reduce(comm, die)
            if name == victim:
                comm.close(caught.value)
                raise caught.value
            start_s = time.monotonic()
            comm.close(caught.value)
            others = "abc".replace(victim, "")
            comm = enter(others, name, ends, 2)
            entered_s.append(time.monotonic() - start_s)
            sums = reduce(comm)
            comm.close()
            return caught.value.peer, sums

        found = at_once({name: lambda name=name: live(name) for name in "abc"})
        died = found.pop(victim)
        assert isinstance(died, CommError)
        assert (died.peer, died.reason) == (None, "the endpoint is closed")
        assert list(found.values()) == [("abc".index(victim), alone())] * 2
        assert max(entered_s) < LINGER_S


def knock(at: Endpoint, member: Membership) -> bytes:
    """Say Hello over a plain client; the answer."""
    with grpc.insecure_channel(at.address) as channel:
        hello = member.hello().SerializeToString()
        return next(channel.stream_stream(EXCHANGE)(iter([hello]), wait_for_ready=True, timeout=20))


def test_a_generation_that_is_over_is_refused() -> None:
    with endpoints("ab") as ends:
        GrpcComm(0, 1, "run", 4, endpoint=ends["b"]).close()
        for generation in (3, 4):
            start_s = time.monotonic()
            with pytest.raises(CommError, match=f"rank 1: refused the connection: generation {generation} is over"):
                enter("ab", "a", ends, generation)
            assert time.monotonic() - start_s < 5.0
        GrpcComm(1, 2, "run", 6, endpoint=ends["b"])
        with pytest.raises(grpc.RpcError) as caught:
            knock(ends["b"], Membership("run", 5, 0, 2))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_no_more_strangers_may_wait_than_fit() -> None:
    with endpoints("b") as ends:
        hello = Membership("run", 9, 0, 2).hello().SerializeToString()
        codes: list[grpc.StatusCode] = []
        refused = threading.Event()

        def ended(call: grpc.Future) -> None:
            codes.append(call.code())
            refused.set()

        with grpc.insecure_channel(ends["b"].address) as channel:
            calls = [channel.stream_stream(EXCHANGE)(iter([hello]), timeout=20) for _ in range(MAX_STRANGERS + 1)]
            for call in calls:
                call.add_done_callback(ended)
            assert refused.wait(20)
            assert codes == [grpc.StatusCode.UNAVAILABLE]
            ends["b"].close()  # nor does it wait for them
            for call in calls:
                assert call.code() is grpc.StatusCode.UNAVAILABLE


def interrupt_waiting(comm: GrpcComm, interrupted: threading.Event) -> None:
    """As soon as others are waited for."""
    limit_s = time.monotonic() + 20
    while not comm.silent(0.1) and time.monotonic() < limit_s:
        time.sleep(0.01)
    comm.interrupt("a new epoch")
    interrupted.set()


def test_an_interrupt_ends_a_sum_and_the_peers_are_told() -> None:
    with endpoints("abc") as ends:
        interrupted = threading.Event()

        def live(name: str) -> tuple[int | None, str]:
            comm = enter("abc", name, ends, 1)
            thread = threading.Thread(target=interrupt_waiting, args=(comm, interrupted))
            if name == "a":
                thread.start()
            with pytest.raises(CommError) as caught:
                reduce(comm, lambda _: name != "c" or interrupted.wait(20))
            start_s = time.monotonic()
            with pytest.raises(CommError, match="a new epoch"):
                comm.barrier("nothing")
            comm.close(caught.value)
            assert time.monotonic() - start_s < LINGER_S / 2
            if name == "a":
                thread.join()
            return caught.value.peer, caught.value.reason

        found = at_once({name: lambda name=name: live(name) for name in "abc"})
        assert found == {"a": (None, "a new epoch"), "b": (0, "a new epoch"), "c": (0, "a new epoch")}


def test_an_interrupt_ends_connecting() -> None:
    with endpoints("ab") as ends:
        for name in "ab":
            comm = GrpcComm("ab".index(name), 2, "run", 3, 20.0, endpoint=ends[name])
            thread = threading.Thread(target=interrupt_waiting, args=(comm, threading.Event()))
            thread.start()
            with pytest.raises(CommError, match="a new epoch") as caught:
                comm.connect([end.address for end in ends.values()])
            assert (caught.value.op, caught.value.peer) == ("connect", None)
            thread.join()
            comm.close(caught.value)
            assert comm.silent(0.0) == []


def test_the_stopped_rank_alone_is_silent() -> None:
    with endpoints("abc") as ends:
        silent: dict[str, list[int]] = {}
        seen = threading.Barrier(3)

        def watch(name: str, comm: GrpcComm) -> None:
            while not (now := comm.silent(0.3)):
                time.sleep(0.01)
            silent[name] = now
            seen.wait(20)

        def live(name: str) -> list[bytes]:
            comm = enter("abc", name, ends, 1)
            comm.barrier("the start")
            assert comm.silent(0.0) == []
            if name == "b":
                seen.wait(20)
                sums = reduce(comm)
            else:
                watching = threading.Thread(target=watch, args=(name, comm))
                watching.start()
                sums = reduce(comm)
                watching.join()
            assert comm.silent(0.0) == []
            comm.close()
            return sums

        found = at_once({name: lambda name=name: live(name) for name in "abc"})
        assert found == dict.fromkeys("abc", alone())
        assert silent == {"a": [1], "c": [1]}


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_a_group_of_one_does_it_all(wire: str) -> None:
    with endpoints("a") as ends:
        comm = enter("a", "a", ends, 2)
        layout, held = parts_of(0, 1)
        split = [TreeSum(NUM_LEAVES, add_buckets) for _ in layout]
        for tree, parts in zip(split, held, strict=True):
            tree.put((0, NUM_LEAVES), parts[0, NUM_LEAVES])
        assert to_bytes(comm.all_reduce(layout, NUM_LEAVES, held, WHAT)) == alone()
        assert to_bytes(comm.start_all_reduce(layout, NUM_LEAVES, held, WHAT)()) == alone()
        slices = comm.reduce_scatter(layout, NUM_LEAVES, held, WHAT)
        assert to_bytes(comm.all_gather_slices(layout, slices, WHAT)) == alone()
        assert comm.slices(layout) == [[(0, bucket.size)] for bucket in layout]
        assert mx.array_equal(comm.all_gather(mx.arange(3), WHAT)[0], mx.arange(3))
        assert mx.array_equal(comm.broadcast(mx.arange(3), 0, WHAT), mx.arange(3))
        assert comm.all_reduce([], NUM_LEAVES, [], WHAT) == []
        comm.barrier(WHAT)
        comm.check(WHAT)
        assert comm.silent(0.0) == []
        comm.close()


async def count(data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    if data != b"the token":
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who is it?")
    for i in range(3):
        yield bytes([i]) * 500_000


def test_further_methods_answer_beside_a_group() -> None:
    end = Endpoint(handlers={"/a.Service/Count": count})
    comm = GrpcComm(0, 1, "run", 1, endpoint=end)
    with grpc.insecure_channel(end.address) as channel:
        answers = channel.unary_stream("/a.Service/Count")(b"the token", timeout=20)
        assert [set(data) for data in answers] == [{0}, {1}, {2}]
        for method, data in (("/a.Service/Count", b"another"), ("/a.Service/Nothing", b"the token")):
            with pytest.raises(grpc.RpcError):
                list(channel.unary_stream(method)(data, timeout=20))
    comm.close()
    end.close()


def test_a_closed_endpoint_does_nothing_and_says_so() -> None:
    end = Endpoint()
    comm = GrpcComm(0, 1, "run", 1, endpoint=end)
    end.close()
    end.close()
    end.call(pytest.fail)
    for call in (comm.barrier, comm.check):
        with pytest.raises(CommError, match="the endpoint is closed"):
            call(WHAT)
    comm.interrupt("nobody hears it")
    comm.close()
    with pytest.raises(CommError, match="the endpoint is closed"):
        GrpcComm(0, 1, "run", 2, endpoint=end).connect([end.address])


def test_the_stream_of_a_peer_that_does_not_leave_is_ended() -> None:
    """As of a process that was stopped, and goes on when the others have another group."""
    hold = threading.Event()

    def messages() -> Iterator[bytes]:
        yield Membership("run", 1, 0, 2).hello().SerializeToString()
        hold.wait(20)

    with endpoints("b") as ends, grpc.insecure_channel(ends["b"].address) as channel:
        call = channel.stream_stream(EXCHANGE)(messages(), timeout=20)
        comm = enter("ab", "b", ends | {"a": ends["b"]}, 1)
        comm.send(mx.zeros(4 << 20), 0, 1, "what is not read")
        start_s = time.monotonic()
        comm.close(OSError("no space left"))
        enter("b", "b", ends, 2).close()
        assert time.monotonic() - start_s < LINGER_S / 2
        assert len(list(call)) > 0  # It ends.
        assert time.monotonic() - start_s < 5.0
        hold.set()
