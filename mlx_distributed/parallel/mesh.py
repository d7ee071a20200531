"""The parallel plan made real: one communicator per axis."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_distributed.comm.base import Communicator


@dataclass(frozen=True)
class Mesh:
    """Axes of the run. Data parallelism is the only one so far; an axis that is not used has size 1 (`LocalComm`)."""

    dp: Communicator
    """Data-parallel axis: every rank holds the whole state and computes some of the micro-batches of a step."""
