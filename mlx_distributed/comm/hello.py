"""Who a rank says it is when a stream begins, and whom it takes for a member of its group."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass, field

from mlx_distributed import __version__
from mlx_distributed.comm._pb import collective_pb2 as pb

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Membership:
    """One rank of one group."""

    run_id: str = field(repr=False)
    """Secret of the run."""
    generation: int
    rank: int
    size: int

    def hello(self) -> pb.Hello:
        """What it says first."""
        return pb.Hello(
            run_id=self.run_id,
            generation=self.generation,
            rank=self.rank,
            size=self.size,
            protocol_version=PROTOCOL_VERSION,
            program_version=__version__,
        )

    def refusal(self, hello: pb.Hello, ranks: Collection[int]) -> str | None:
        """Why a peer is not taken, in words that give nothing of this run away.

        Args:
            hello: what it has said.
            ranks: any of which it may be.
        """
        mine = self.hello()
        if not hmac.compare_digest(hello.run_id.encode(), mine.run_id.encode()):
            return "this is another run"
        for name in ("protocol_version", "program_version", "generation", "size"):
            theirs, ours = getattr(hello, name), getattr(mine, name)
            if theirs != ours:
                return f"{name} is {theirs} there and {ours} here"
        if hello.rank not in ranks:
            return f"rank {hello.rank} is not expected"
        return None
