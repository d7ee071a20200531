"""Groups over real gRPC on loopback, one thread per rank."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import mlx.core as mx
import numpy as np
import pytest

from mlx_distributed.comm.base import Communicator, LocalComm, add_buckets
from mlx_distributed.comm.buckets import make_layout, to_buckets
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.grpc_streams import METHOD, SERVICE
from mlx_distributed.comm.hello import Membership
from mlx_distributed.comm.mailbox import MAX_UNREAD_BYTES
from mlx_distributed.comm.tree_sum import TreeSum
from mlx_distributed.comm.wire import MAX_MESSAGE_BYTES, Frame, Kind, encode, group_tag
from mlx_distributed.errors import CommError
from mlx_distributed.testing import run_ranks

Result = list[bytes]


def reduce_leaves(num_leaves: int, edges: list[int]) -> Callable[[Communicator], Result]:
    """An all_reduce of random leaves, of which rank r holds edges[r] to edges[r + 1]; returns the bytes of the sum."""

    def body(comm: Communicator) -> Result:
        rng = np.random.default_rng(0)
        leaves = [
            {
                "matrix": mx.array(rng.standard_normal((700, 501), np.float32)),
                "vector": mx.array(rng.standard_normal(7, np.float32)),
                "count": mx.array([i], mx.int64),
            }
            for i in range(num_leaves)
        ]
        layout = make_layout(leaves[0], bucket_bytes=1 << 20)
        trees = [TreeSum(num_leaves, add_buckets) for _ in layout]
        for i in range(edges[comm.rank], edges[comm.rank + 1]):
            for tree, bucket in zip(trees, to_buckets(layout, leaves[i]), strict=True):
                tree.put((i, i + 1), bucket)
        summed = comm.all_reduce(layout, num_leaves, (tree.parts for tree in trees), "a test")
        return [np.asarray(array).tobytes() for bucket in summed for array in bucket]

    return body


@pytest.mark.parametrize(
    "edges", [[0, 8], [0, 4, 8], [0, 3, 8], [0, 8, 8], [0, 3, 6, 8], [0, 0, 8, 8], [0, 1, 2, 7, 8], [0, 5, 8, 8, 8]]
)
def test_the_sum_has_the_same_bits_on_any_number_of_ranks(edges: list[int]) -> None:
    alone = reduce_leaves(8, [0, 8])(LocalComm())
    assert run_ranks(len(edges) - 1, reduce_leaves(8, edges)) == [alone] * (len(edges) - 1)


def test_operations_of_every_size_follow_each_other_without_end() -> None:
    """Ranks run ahead of each other by an operation, and messages and frames share a stream: nothing may get stuck."""

    def body(comm: GrpcComm) -> list[float]:
        rng = np.random.default_rng(1)
        totals = []
        for _ in range(120):
            arrays = {"w": mx.full(int(10 ** rng.uniform(0, 5.7)), comm.rank + 1.0)}
            layout = make_layout(arrays)
            comm.barrier("a soak")
            parts = {(comm.rank, comm.rank + 1): to_buckets(layout, arrays)[0]}
            ((summed,),) = comm.all_reduce(layout, comm.size, [parts], "a soak")
            totals.append(float(np.asarray(summed).mean()))
        return totals

    assert run_ranks(4, body) == [[10.0] * 120] * 4


def test_gather_broadcast_send_and_recv_carry_any_dtype_and_shape() -> None:
    def body(comm: GrpcComm) -> list[mx.array]:
        mine = mx.arange(comm.rank, dtype=mx.bfloat16)
        large = (mx.arange(700_000) % 251).astype(mx.uint16)
        gathered = comm.all_gather(mine, "tests")
        sent = comm.broadcast(large if comm.rank == 1 else None, 1, "tests")
        comm.barrier("tests")
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        comm.send(mx.array([comm.rank]), right, 7, "later")
        comm.send(mx.array(True), right, 6, "sooner")
        return [*gathered, sent, comm.recv(left, 6, "sooner"), comm.recv(left, 7, "later")]

    for rank, result in enumerate(run_ranks(3, body)):
        assert not isinstance(result, BaseException)
        assert [array.shape for array in result[:3]] == [(0,), (1,), (2,)]
        assert {array.dtype for array in result[:3]} == {mx.bfloat16}
        assert mx.array_equal(result[3], (mx.arange(700_000) % 251).astype(mx.uint16))
        assert result[4].item() is True
        assert result[5].tolist() == [(rank - 1) % 3]


def test_a_silent_rank_is_named_by_all_within_the_deadline() -> None:
    entered = threading.Event()

    def body(comm: GrpcComm) -> Result:
        if comm.rank == 2:
            entered.wait(30)  # holds on to the connection and says nothing, as a stopped process does
            raise KeyboardInterrupt
        start_s = time.monotonic()
        try:
            return reduce_leaves(4, [0, 2, 4, 4])(comm)
        finally:
            assert time.monotonic() - start_s < 2.0
            if comm.rank == 0:
                entered.set()

    errors = run_ranks(3, body, timeout_s=1.0)
    for error in errors[:2]:
        assert isinstance(error, CommError)
        assert error.peer == 2
        assert error.op == "all_reduce of a test"
        assert re.fullmatch(r"sent nothing for 1\.\d s", error.reason)
        assert "rank 2" in str(error)


def test_a_rank_that_fails_tells_the_others_why_and_the_group_is_dead() -> None:
    def body(comm: GrpcComm) -> list[CommError]:
        comm.barrier("the start")  # or some would still be connecting
        if comm.rank == 1:
            for peer in (0, 2):  # or some would still be in the barrier, and fail there
                comm.recv(peer, 2, "that it is over")
            raise OSError("no space\nleft")
        comm.send(mx.zeros(1), 1, 2, "that it is over")
        errors = []
        for call in (
            lambda: comm.barrier("x"),
            lambda: comm.recv(2, 1, "x"),
            lambda: comm.send(mx.zeros(1), 2, 1, "x"),
        ):
            with pytest.raises(CommError) as caught:
                call()
            errors.append(caught.value)
        assert errors[1].elapsed_s < 0.5
        return errors

    failed = run_ranks(3, body)
    assert isinstance(failed[1], OSError)
    for errors in (failed[0], failed[2]):
        assert isinstance(errors, list)
        for error in errors:
            assert (error.peer, error.reason) == (1, "no space left")


def test_a_closed_group_refuses_calls_and_a_peer_that_left_is_named() -> None:
    def body(comm: GrpcComm) -> CommError:
        if comm.rank == 1:
            comm.close()
            with pytest.raises(CommError, match="closed") as caught:
                comm.barrier("nobody")
        else:
            with pytest.raises(CommError, match="rank 1: has left the group") as caught:
                comm.recv(1, 3, "what never comes")
        return caught.value

    assert all(isinstance(error, CommError) for error in run_ranks(2, body))


def test_ranks_that_disagree_about_what_is_reduced_are_refused() -> None:
    def body(comm: GrpcComm) -> object:
        arrays = {"w": mx.zeros(50_000 + comm.rank)}
        layout = make_layout(arrays)
        parts = {(comm.rank, comm.rank + 1): to_buckets(layout, arrays)[0]}
        return comm.all_reduce(layout, 2, [parts], "unequal shapes")

    for error in run_ranks(2, body):
        assert isinstance(error, CommError)
        assert "bytes for" in error.reason


def test_a_port_in_use_is_said_in_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CommError, match="port in use"):
            GrpcComm(0, 2, "run", listen=f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_missing_peer_is_named_when_connecting() -> None:
    comm = GrpcComm(0, 2, "run", timeout_s=0.3)
    with socket.socket() as taken:  # bound and not listening: refuses every connection
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(CommError, match="rank 1"):
            comm.connect([comm.address, f"127.0.0.1:{taken.getsockname()[1]}"])
    comm.close()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"run_id": "another"}, "this is another run"),
        ({"generation": 4}, "generation is 4 there and 0 here"),
        ({"size": 3}, "size is 3 there and 2 here"),
    ],
)
def test_a_stranger_is_refused_and_the_group_goes_on(kwargs: dict, words: str) -> None:
    ours = [GrpcComm(rank, 2, "run", timeout_s=20) for rank in range(2)]
    addresses = [comm.address for comm in ours]
    stranger = GrpcComm(**{"rank": 0, "size": 2, "run_id": "run", "timeout_s": 20} | kwargs)
    with pytest.raises(CommError, match=words):
        stranger.connect([stranger.address, *addresses[1:], *addresses[1:]])
    stranger.close()
    thread = threading.Thread(target=ours[1].connect, args=(addresses,))
    thread.start()
    ours[0].connect(addresses)
    thread.join()
    closing = threading.Thread(target=ours[0].close)
    closing.start()
    ours[1].close()
    closing.join()


def test_a_rank_that_answers_as_another_is_refused() -> None:
    comms = [GrpcComm(rank, 3, "run", timeout_s=20) for rank in range(3)]
    swapped = [comms[rank].address for rank in (0, 2, 1)]
    with pytest.raises(CommError, match=r"answers at .* as somebody else: rank . is not expected"):
        comms[0].connect(swapped)
    for comm in comms:
        comm.close()


def test_unwanted_messages_beside_the_one_awaited_are_refused_at_the_limit() -> None:
    def body(comm: GrpcComm) -> None:
        if comm.rank == 0:
            for _ in range(6):
                comm.send(mx.zeros(MAX_UNREAD_BYTES // 4, mx.uint8), 1, 2, "a flood")
            comm.recv(1, 9, "nothing")
        else:
            comm.recv(0, 1, "what never comes")

    for error in run_ranks(2, body):
        assert isinstance(error, CommError)
        assert "nobody has asked for" in error.reason


def speak(address: str, *messages: bytes) -> grpc.RpcError | bytes:
    """Say what no member would say, over a plain gRPC client; returns the answer."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(messages), wait_for_ready=True, timeout=20)
        try:
            return next(call)
        except grpc.RpcError as error:
            return error


def test_noise_is_refused_before_it_costs_anything() -> None:
    comm = GrpcComm(1, 2, "run", timeout_s=20)
    for noise in (b"", b"\xff\xff\xff", b"x" * 100):
        answer = speak(comm.address, noise)
        assert isinstance(answer, grpc.RpcError)
        assert answer.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED)
    answer = speak(comm.address, b"\0" * (2 * MAX_MESSAGE_BYTES))
    assert isinstance(answer, grpc.RpcError)
    assert answer.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    comm.close()


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"too short", "is no frame"),
        (encode(group_tag("another", 0), Frame(Kind.END, 1)), "another run"),
        (encode(group_tag("run", 0), Frame(Kind.MESSAGE, 1, 0, 5, 0, 2)), "chunk 5 of 2"),
        (encode(group_tag("run", 0), Frame(Kind.ABORT, payload=b"{}")), "left without a reason"),
        (encode(group_tag("run", 0), Frame(Kind.RESULT, 0)), "operation 0"),
        (b"\0" * (MAX_MESSAGE_BYTES + 1), "the stream ended"),
    ],
)
def test_a_member_that_sends_nonsense_is_named(frame: bytes, words: str) -> None:
    comm = GrpcComm(1, 2, "run", timeout_s=20)
    hello = Membership("run", 0, 0, 2).hello().SerializeToString()
    hold = threading.Event()

    def messages() -> Iterator[bytes]:
        yield hello
        yield frame
        hold.wait(20)

    with grpc.insecure_channel(comm.address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(messages(), wait_for_ready=True, timeout=20)
        comm.connect(["", comm.address])
        with pytest.raises(CommError, match=words) as caught:
            comm.recv(0, 3, "sense")
        assert caught.value.peer == 0
        hold.set()
        call.cancel()
    comm.close()


def test_what_nobody_asks_for_is_not_read_without_bound() -> None:
    """A flood of messages stops at the limit, and everything still arrives once it is asked for."""
    num_messages, size = 6, MAX_UNREAD_BYTES // 4

    def body(comm: GrpcComm) -> int:
        if comm.rank == 0:
            for i in range(num_messages):
                comm.send(mx.full((size,), i, mx.uint8), 1, 1, "a flood")
            return int(comm.recv(1, 2, "thanks").item())
        total = 0
        for i in range(num_messages):
            array = comm.recv(0, 1, "a flood")
            assert array[0].item() == i
            total += array.size
            assert comm._session._mailbox.unread_bytes[0] <= MAX_UNREAD_BYTES + MAX_MESSAGE_BYTES
        comm.send(mx.array(total), 0, 2, "thanks")
        return total

    assert run_ranks(2, body) == [num_messages * size] * 2


def test_who_is_given_up_while_it_waits_itself_names_whom_it_waits_for() -> None:
    """Rank 1 does nothing, rank 0 waits for it, and rank 2 for rank 0, of which it loses patience first."""
    comms = [GrpcComm(rank, 3, "run", timeout_s=timeout_s) for rank, timeout_s in enumerate((1.5, 30.0, 1.0))]
    over = threading.Event()

    def wait_for(comm: GrpcComm, peer: int) -> CommError:
        with pytest.raises(CommError) as caught:
            comm.recv(peer, 0, "a test")
        comm.close(caught.value)
        return caught.value

    def be(rank: int) -> CommError | None:
        comms[rank].connect([comm.address for comm in comms])
        if rank != 1:
            return wait_for(comms[rank], 1 if rank == 0 else 0)
        over.wait()
        comms[rank].close(KeyboardInterrupt("over"))
        return None

    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(be, rank) for rank in range(3)]
        first, last = ranks[0].result(), ranks[2].result()
        over.set()
    assert first is not None
    assert last is not None
    assert (first.peer, last.peer) == (1, 1)
    assert re.fullmatch(r"sent nothing for [01]\.\d s", first.reason), first


def test_the_end_of_a_chain_of_waits_is_named_by_all() -> None:
    """Every rank waits for the next one, as in a pipeline, and the last one does nothing."""
    comms = [GrpcComm(rank, 4, "run", timeout_s=1.0) for rank in range(4)]
    over = threading.Event()

    def be(rank: int) -> CommError | None:
        comms[rank].connect([comm.address for comm in comms])
        comms[rank].barrier("a test")
        if rank == 3:
            over.wait()
            comms[rank].close(KeyboardInterrupt("over"))
            return None
        with pytest.raises(CommError) as caught:
            comms[rank].recv(rank + 1, 0, "a test")
        comms[rank].close(caught.value)
        return caught.value

    with ThreadPoolExecutor(4) as pool:
        ranks = [pool.submit(be, rank) for rank in range(4)]
        errors = [rank.result() for rank in ranks[:3]]
        over.set()
    assert [error and error.peer for error in errors] == [3, 3, 3]
