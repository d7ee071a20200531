"""The words of `protocol` as protobuf messages, and back."""

from __future__ import annotations

import math

from mlx_distributed.comm._pb import membership_pb2 as pb
from mlx_distributed.elastic.protocol import (
    Commit,
    Ended,
    Enter,
    Epoch,
    EpochId,
    Evicted,
    Facts,
    Fetch,
    Hello,
    Loss,
    Message,
    Outcome,
    Refused,
    Seat,
    Standing,
    WorkerId,
)

SERVICE, METHOD = "mlx_distributed.v1.Membership", "Attend"
TOKEN = "run-token"
"""Metadata key of the secret of the run."""
MAX_MESSAGE_BYTES = 1 << 16
"""A larger message is refused by the transport before it is read."""


def arrival_to_pb(hello: Hello) -> pb.FromWorker:
    arrival = pb.Arrival(
        name=hello.worker.name,
        incarnation=hello.worker.incarnation,
        address=hello.address,
        run_id=hello.facts.run_id,
        program_version=hello.facts.program_version,
        config_digest=hello.facts.config_digest,
        standing=_standing_to_pb(hello.standing),
    )
    return pb.FromWorker(arrival=arrival)


def arrival_from_pb(arrival: pb.Arrival) -> Hello:
    """Raises ValueError where there is no name."""
    if not arrival.name or not arrival.incarnation:
        raise ValueError("a worker without a name")
    facts = Facts(arrival.run_id, arrival.program_version, arrival.config_digest)
    worker = WorkerId(arrival.name, arrival.incarnation)
    return Hello(worker, arrival.address, facts, standing_from_pb(arrival.standing))


def standing_to_pb(standing: Standing) -> pb.FromWorker:
    return pb.FromWorker(standing=_standing_to_pb(standing))


def standing_from_pb(standing: pb.Standing) -> Standing:
    """Raises ValueError where what was measured is not a number that can be."""
    for measured in (standing.speed, standing.bandwidth, standing.round_trip_s):
        if not (math.isfinite(measured) and measured >= 0):
            raise ValueError(f"a speed, bandwidth or round trip of {measured}")
    return Standing(
        serial=standing.serial,
        committed=_outcome_from_pb(standing.committed),
        epoch=_id_from_pb(standing.epoch) if standing.HasField("epoch") else None,
        prepared=_outcome_from_pb(standing.prepared) if standing.HasField("prepared") else None,
        speed=standing.speed,
        waiting_for=tuple(standing.waiting_for),
        lost=Loss(standing.lost.name, standing.lost.reason) if standing.HasField("lost") else None,
        bandwidth=standing.bandwidth,
        round_trip_s=standing.round_trip_s,
    )


def message_to_pb(term: int, message: Message) -> pb.FromCoordinator:
    match message:
        case Commit(outcome, epoch, weights):
            commit = pb.Commit(outcome=_outcome_to_pb(outcome), epoch=_id_to_pb(epoch), weights=weights)
            return pb.FromCoordinator(term=term, commit=commit)
        case Enter(epoch):
            return pb.FromCoordinator(term=term, enter=_epoch_to_pb(epoch))
        case Fetch(outcome, sources):
            return pb.FromCoordinator(term=term, fetch=pb.Fetch(outcome=_outcome_to_pb(outcome), sources=sources))
        case Evicted(reason, must_fetch):
            return pb.FromCoordinator(term=term, evicted=pb.Evicted(reason=reason, must_fetch=must_fetch))
        case Refused(reason):
            return pb.FromCoordinator(term=term, refused=reason)
        case Ended(reason, failed):
            return pb.FromCoordinator(term=term, ended=pb.Ended(reason=reason, failed=failed))


def message_from_pb(message: pb.FromCoordinator) -> Message:
    """Raises ValueError where it is empty."""
    match message.WhichOneof("body"):
        case "commit":
            commit = message.commit
            return Commit(_outcome_from_pb(commit.outcome), _id_from_pb(commit.epoch), tuple(commit.weights))
        case "enter":
            return Enter(_epoch_from_pb(message.enter))
        case "fetch":
            return Fetch(_outcome_from_pb(message.fetch.outcome), tuple(message.fetch.sources))
        case "evicted":
            return Evicted(message.evicted.reason, message.evicted.must_fetch)
        case "refused":
            return Refused(message.refused)
        case "ended":
            return Ended(message.ended.reason, message.ended.failed)
    raise ValueError("an empty message")


def _standing_to_pb(standing: Standing) -> pb.Standing:
    return pb.Standing(
        serial=standing.serial,
        committed=_outcome_to_pb(standing.committed),
        epoch=_id_to_pb(standing.epoch) if standing.epoch else None,
        prepared=_outcome_to_pb(standing.prepared) if standing.prepared else None,
        speed=standing.speed,
        waiting_for=standing.waiting_for,
        lost=pb.Loss(name=standing.lost.name, reason=standing.lost.reason) if standing.lost else None,
        bandwidth=standing.bandwidth,
        round_trip_s=standing.round_trip_s,
    )


def _outcome_to_pb(outcome: Outcome) -> pb.Outcome:
    return pb.Outcome(step=outcome.step, digest=outcome.digest)


def _outcome_from_pb(outcome: pb.Outcome) -> Outcome:
    return Outcome(outcome.step, outcome.digest)


def _id_to_pb(epoch: EpochId) -> pb.EpochId:
    return pb.EpochId(term=epoch.term, sequence=epoch.sequence)


def _id_from_pb(epoch: pb.EpochId) -> EpochId:
    return EpochId(epoch.term, epoch.sequence)


def _epoch_to_pb(epoch: Epoch) -> pb.Epoch:
    seats = [
        pb.Seat(
            name=seat.worker.name,
            incarnation=seat.worker.incarnation,
            address=seat.address,
            weight=seat.weight,
            bandwidth=seat.bandwidth,
        )
        for seat in epoch.seats
    ]
    return pb.Epoch(
        id=_id_to_pb(epoch.id), committed=_outcome_to_pb(epoch.committed), seats=seats, reason=epoch.reason
    )  # fmt: skip


def _epoch_from_pb(epoch: pb.Epoch) -> Epoch:
    seats = tuple(
        Seat(WorkerId(seat.name, seat.incarnation), seat.address, seat.weight, seat.bandwidth) for seat in epoch.seats
    )
    return Epoch(_id_from_pb(epoch.id), _outcome_from_pb(epoch.committed), seats, epoch.reason)
