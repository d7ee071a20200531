"""What a coordinator answers to who is no member of the run: how to become one, and how the run stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_distributed.comm._pb import membership_pb2 as pb
from mlx_distributed.elastic.messages import SERVICE
from mlx_distributed.elastic.protocol import EpochId
from mlx_distributed.elastic.state import State

DESCRIBE, STATUS = f"/{SERVICE}/Describe", f"/{SERVICE}/Status"


@dataclass(frozen=True)
class Description:
    """All that a new worker needs besides data and model."""

    program_version: str
    run_id: str
    wandb_id: str
    config: str = field(repr=False)
    """Resolved, as YAML."""
    key: str = field(repr=False)
    """PEM of the private key of the run; with the certificate what `comm.tls.Identity` is made of."""
    certificate: str = field(repr=False)
    """PEM."""


@dataclass(frozen=True)
class MemberStatus:
    """A worker that is with the coordinator."""

    name: str
    address: str
    connected: bool
    weight: float | None
    """Of its share of a step; None while it is not in the epoch."""
    num_committed: int
    """Steps in its state; -1 where it has none."""
    speed: float
    """Micro-batches per second; 0 where it has not measured."""
    silent_s: float
    waited_for: bool
    """The others cannot go on without it."""
    bandwidth: float = 0.0
    """Of its link, in bytes per second; 0 where it has not been measured."""
    round_trip_s: float = 0.0
    """To the nearest of the others; likewise."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands."""

    program_version: str
    run_id: str
    epoch: EpochId | None
    reason: str
    """Why the epoch was formed."""
    num_committed: int
    num_steps: int
    waiting: str
    """What training waits for; empty while it goes on."""
    members: tuple[MemberStatus, ...]
    """By rank, then those that are not in the epoch, by name."""


def status_of(state: State, now_s: float) -> RunStatus:
    """How a run stands at `now_s` of the coordinator's monotonic clock."""
    seats = {seat.worker: seat for seat in state.epoch.seats} if state.epoch else {}
    ranks = {worker: rank for rank, worker in enumerate(seats)}
    members = sorted(state.members.values(), key=lambda m: (ranks.get(m.worker, len(ranks)), m.worker.name))
    waited_for = state.waited_for()
    facts = state.rules.facts
    return RunStatus(
        program_version=facts.program_version,
        run_id=facts.run_id,
        epoch=state.epoch.id if state.epoch else None,
        reason=state.epoch.reason if state.epoch else "",
        num_committed=state.committed.step,
        num_steps=state.rules.num_steps,
        waiting=state.waiting,
        members=tuple(
            MemberStatus(
                name=member.worker.name,
                address=member.address,
                connected=member.connected,
                weight=seats[member.worker].weight if member.worker in seats else None,
                num_committed=member.standing.committed.step,
                speed=member.standing.speed,
                silent_s=max(now_s - member.heard_s, 0.0),
                waited_for=member.worker.name in waited_for,
                bandwidth=member.standing.bandwidth,
                round_trip_s=member.standing.round_trip_s,
            )
            for member in members
        ),
    )


def description_to_pb(description: Description) -> pb.Description:
    return pb.Description(**vars(description))


def description_from_pb(message: pb.Description) -> Description:
    return Description(
        message.program_version, message.run_id, message.wandb_id, message.config, message.key, message.certificate
    )  # fmt: skip


def status_to_pb(status: RunStatus) -> pb.RunStatus:
    epoch = pb.EpochId(term=status.epoch.term, sequence=status.epoch.sequence) if status.epoch else None
    return pb.RunStatus(
        program_version=status.program_version,
        run_id=status.run_id,
        epoch=epoch,
        reason=status.reason,
        num_committed=status.num_committed,
        num_steps=status.num_steps,
        waiting=status.waiting,
        members=[pb.MemberStatus(**vars(member)) for member in status.members],
    )


def status_from_pb(message: pb.RunStatus) -> RunStatus:
    return RunStatus(
        program_version=message.program_version,
        run_id=message.run_id,
        epoch=EpochId(message.epoch.term, message.epoch.sequence) if message.HasField("epoch") else None,
        reason=message.reason,
        num_committed=message.num_committed,
        num_steps=message.num_steps,
        waiting=message.waiting,
        members=tuple(
            MemberStatus(
                name=member.name,
                address=member.address,
                connected=member.connected,
                weight=member.weight if member.HasField("weight") else None,
                num_committed=member.num_committed,
                speed=member.speed,
                silent_s=member.silent_s,
                waited_for=member.waited_for,
                bandwidth=member.bandwidth,
                round_trip_s=member.round_trip_s,
            )
            for member in message.members
        ),
    )
