"""The parallel plan made real: one communicator per axis."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_distributed.comm.base import Communicator, LocalComm


@dataclass(frozen=True)
class Mesh:
    """Axes of the run; one that is not used has size 1 (`LocalComm`)."""

    dp: Communicator
    """Data-parallel axis: every rank holds the same part of the state and computes some of the micro-batches."""
    pp: Communicator = field(default_factory=LocalComm)
    """Pipeline-parallel axis: every rank holds other layers, and all compute the same micro-batches."""
    machines: tuple[str, ...] = ()
    """By rank, the machine that it is on, in words; empty where all are on one."""
