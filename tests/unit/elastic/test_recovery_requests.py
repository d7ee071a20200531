"""Requests and answers that make no sense are refused, before memory is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from elastic_recovery import (
    MINE,
    TOKEN,
    Arrays,
    Trainer,
    fetch,
    newcomer,
    outcome_of,
    running,
    small_slices,
    state_after,
)

from mlx_distributed.comm._pb import recovery_pb2 as pb
from mlx_distributed.comm.endpoint import Endpoint
from mlx_distributed.elastic import snapshots
from mlx_distributed.elastic.protocol import NOTHING, Outcome
from mlx_distributed.elastic.recovery import NotReceived, fetch_state
from mlx_distributed.elastic.snapshots import MAX_BATCH, METHOD, Item, Snapshot, StateServer

__all__ = ["newcomer", "small_slices"]


def test_without_the_token_nothing_is_told(newcomer: Endpoint) -> None:
    source = Trainer(4)
    with running(source):
        for token in ("", TOKEN[:-1], "\N{SNOWMAN}"):
            with pytest.raises(NotReceived, match="the token is not that of this run"):
                fetch(newcomer, [source], 4, token=token)
        assert source.train() == [False], "nothing was pinned"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": np.zeros(3, np.int32)}, r"b is int32\[2\] there and int32\[3\] here"),
        ({"b": np.zeros(2, np.uint32)}, r"b is int32\[2\] there and uint32\[2\] here"),
        ({"z": np.zeros((), np.uint8)}, r"z is missing there and uint8\[\] here"),
        ({"b": None}, r"b is int32\[2\] there and missing here"),
    ],
)
def test_the_state_of_another_model_is_refused(newcomer: Endpoint, change: dict, words: str) -> None:
    source = Trainer(4)
    arrays: Arrays = {name: each for name, each in {**MINE.arrays, **change}.items() if each is not None}
    with running(source), pytest.raises(NotReceived, match=words):
        fetch(newcomer, [source], 4, Snapshot(NOTHING, MINE.counters, arrays))
    assert source.num_slices == 0


def test_other_counters_are_refused(newcomer: Endpoint) -> None:
    source = Trainer(4)
    with running(source), pytest.raises(NotReceived, match=r"counts \['num_tokens'\] there and \['steps'\] here"):
        fetch(newcomer, [source], 4, Snapshot(NOTHING, {"steps": 0}, MINE.arrays))


def test_another_history_is_refused(newcomer: Endpoint) -> None:
    source = Trainer(4)
    with running(source), pytest.raises(NotReceived, match="it has taken another step 4"):
        fetch_state(newcomer, [source.address], Outcome(4, "another"), MINE, lambda _: {}, TOKEN)


def answers(server: StateServer, request: pb.StateRequest | bytes) -> list[pb.StateAnswer]:
    """What a server says, its messages taken for answers."""
    data = request if isinstance(request, bytes) else request.SerializeToString()

    async def collect() -> list[bytes]:
        return [message async for message in server.handlers[METHOD](data, None)]

    return [pb.StateAnswer.FromString(message) for message in asyncio.run(collect())]


def test_requests_that_make_no_sense_are_refused(small_slices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "WAIT_S", 0.0)
    server = StateServer(TOKEN)
    server.publish(state_after(4))
    item = Item(outcome_of(4), sums=False).to_pb()

    def refusal(**what: object) -> str:
        (answer,) = answers(server, pb.StateRequest(token=TOKEN, **what))  # type: ignore[arg-type]
        return answer.refused

    assert "any more" in refusal(manifest=item), "nobody has asked to hold it"
    assert answers(server, pb.StateRequest(token=TOKEN, hold=4))[0].held
    assert "none that is known" in refusal()
    assert "any more" in refusal(manifest=Item(outcome_of(4), sums=True).to_pb())
    assert "any more" in refusal(manifest=Item(Outcome(4, "another"), sums=False).to_pb())
    assert "no state after step 5" in refusal(manifest=Item(outcome_of(5), sums=False).to_pb())
    assert "at most 8" in refusal(slices=pb.StateSlices(item=item, numbers=range(MAX_BATCH + 1)))
    assert "there are 87 slices" in refusal(slices=pb.StateSlices(item=item, numbers=[87]))
    monkeypatch.setattr(snapshots, "MAX_CALLS", 0)
    assert "too many workers" in refusal(manifest=item)
    for data in (b"", b"\xff", b"not a request"):
        assert "token" in answers(server, data)[0].refused


def lying(answer: Callable[[pb.StateAnswer], bytes], about: str = "manifest") -> Trainer:
    """A worker whose answers are changed."""

    class Liar(Trainer):
        async def _answer(self, data: bytes, context: object):  # type: ignore[no-untyped-def]
            async for message in super()._answer(data, context):
                if pb.StateRequest.FromString(data).WhichOneof("what") != about:
                    yield message
                else:
                    yield answer(pb.StateAnswer.FromString(message))

    return Liar(4)


def twice(answer: pb.StateAnswer) -> bytes:
    answer.arrays.extend(list(answer.arrays))
    return answer.SerializeToString()


def more_hashes(answer: pb.StateAnswer) -> bytes:
    answer.hashes += answer.hashes
    return answer.SerializeToString()


def no_hashes(answer: pb.StateAnswer) -> bytes:
    return pb.StateAnswer(
        num_arrays=answer.num_arrays, counters=answer.counters, arrays=answer.arrays
    ).SerializeToString()


def no_arrays(answer: pb.StateAnswer) -> bytes:
    answer.ClearField("arrays")
    return answer.SerializeToString()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda _: b"\xff", "Error parsing"),
        (lambda _: bytes(2 << 20), "larger than max"),
        (twice, "b is int32"),
        (more_hashes, "it has not the hashes of 1 slices"),
        (no_hashes, "it has not the hashes of 1 slices"),
        (no_arrays, "it names 0 of 2 arrays"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    newcomer: Endpoint, answer: Callable[[pb.StateAnswer], bytes], words: str
) -> None:
    source = lying(answer)
    with running(source), pytest.raises(NotReceived, match=words):
        fetch(newcomer, [source], 4)


def test_steps_that_do_not_follow_each_other_are_refused(newcomer: Endpoint) -> None:
    def leap(answer: pb.StateAnswer) -> bytes:
        answer.held.add(step=10**12, digest="x")
        return answer.SerializeToString()

    source = lying(leap, "hold")
    with running(source), pytest.raises(NotReceived, match="do not follow each other"):
        fetch(newcomer, [source], 4)
