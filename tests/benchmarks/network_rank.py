"""One rank of `networks.py`: a process in a network namespace that does what it is told, one message after the other.

It keeps a group of every transport that has had a turn: none of them uses the processor or the link between its turns
(MLX's ring spins, but only while an operation of its own is under way).
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from overlap import time_sides

from mlx_distributed.cli.bench.gloo import gloo_side, import_torch, join_gloo
from mlx_distributed.cli.bench.measure import values_of
from mlx_distributed.cli.bench.sides import Side, grpc_side, join_ring, ring_side
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.load import load_all
from mlx_distributed.cli.run import choose_device
from mlx_distributed.comm.base import Communicator
from mlx_distributed.comm.buckets import BucketLayout, to_buckets
from mlx_distributed.comm.group import join_group
from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.comm.native import NativeComm
from mlx_distributed.config import load_config
from mlx_distributed.elastic.links import share_slices
from mlx_distributed.parallel.mesh import Mesh
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.setup import gradient_layout, init_state, make_optimizer
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.trainer import Trainer

PORTS = {"grpc": 7000, "owned": 7001, "ring": 7002, "gloo": 7003, "measured": 7004}
TIMEOUT_S = 300.0

Run = Callable[[], Any]


class Rank:
    """What a rank, over links of these rates, has joined."""

    def __init__(self, rank: int, rates_mbit: Sequence[int]) -> None:
        self._rank, self._rates_mbit = rank, rates_mbit
        self._ours: dict[str, Communicator] = {}
        self._others: dict[str, Any] = {}

    def comm(self, name: str) -> Communicator:
        """`grpc` (equal slices), `owned` (slices by the rates of the links) or `measured` (by what `probe` has found);
        all ranks ask in one order."""
        if name not in self._ours:
            rank, addresses = self._rank, self._addresses(name)
            bandwidths = self._rates_mbit if name == "owned" else None
            self._ours[name] = join_group(
                rank, len(addresses), "run", TIMEOUT_S, addresses[rank], lambda _: addresses, bandwidths
            )
        return self._ours[name]

    def ring(self) -> NativeComm:
        """Likewise."""
        if "ring" not in self._others:
            self._others["ring"] = join_ring(self._rank, self._addresses("ring"))
        return self._others["ring"]

    def gloo(self) -> Any:
        """PyTorch, whose Gloo has been joined."""
        if "gloo" not in self._others:
            torch, _ = import_torch()
            join_gloo(torch, self._rank, len(self._rates_mbit), self._addresses("gloo")[0])
            self._others["gloo"] = torch
        return self._others["gloo"]

    def side(self, name: str, wire: str) -> Side:
        """Ours in buckets as training has them, the others of one array, which is what they do best."""
        if name == "gloo":
            return gloo_side(self.gloo())
        return ring_side(self.ring()) if name == "ring" else grpc_side(self.comm(name), wire)

    def measured(self, run: Run) -> tuple[float, int, Any]:
        """Seconds and sent bytes of what all ranks run at the same time, and what it gave."""
        self.comm("grpc").barrier("the beginning")
        before_bytes, start_s = sent_bytes(), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start_s
        self.comm("grpc").barrier("the end")  # Until then the peers may be waiting for some of our bytes.
        return seconds, sent_bytes() - before_bytes, result

    def probe(self) -> dict[str, Any]:
        """Measure the links as the workers of an elastic run do, and share the slices of `measured` by that."""
        comm = self.comm("measured")
        assert isinstance(comm, GrpcComm)
        comm.barrier("the beginning")
        start_s = time.perf_counter()
        links = share_slices([0.0] * comm.size, comm)
        seconds = time.perf_counter() - start_s
        return {"seconds": seconds, "mbit_per_s": links[self._rank].bytes_per_s * 8e-6}

    def all_reduce(self, side: str, num_elements: int, wire: str) -> dict[str, float]:
        """One allreduce."""
        reduce = self.side(side, wire).prepare(values_of(self._rank, num_elements))
        seconds, num_bytes, _ = self.measured(reduce)
        return {"seconds": seconds, "sent_bytes": num_bytes}

    def train(self, config_file: str, wires: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """All steps of a real run, each taken by ours in every wire format and by the ring; figures by their names."""
        choose_device("auto")
        config = load_config(Path(config_file))
        loaded = load_all(config, self.comm("grpc"))
        state = TrainState(loaded.model, {})
        state.optimizer = make_optimizer(config).init(state.parameters)

        def step_of(comm: Communicator, wire: str, step: int) -> dict[str, float]:
            layout = gradient_layout(state.parameters, wire)
            alone_s, *_ = self.measured(reduction(comm, layout, state.parameters))
            wired = replace(config, parallel=replace(config.parallel, wire=wire))
            trainer = Trainer(Phases(wired, loaded.plan, loaded.rows.train))
            state.step = step  # every side computes the same micro-batches
            _, num_bytes, info = self.measured(lambda: trainer.train_step(state, Mesh(dp=comm)))
            times = {"step_s": info.step_s, "comm_s": info.comm_s, "exposed_s": info.comm_exposed_s}
            return {**times, "alone_s": alone_s, "sent_bytes": num_bytes}

        steps: dict[str, list[dict[str, float]]] = {name: [] for name in (*wires, "ring")}
        for step, name in itertools.product(range(loaded.plan.num_steps), steps):
            comm, wire = (self.ring(), "fp32") if name == "ring" else (self.comm("grpc"), name)
            steps[name].append(step_of(comm, wire, step))
        return steps

    def run(self, config_file: str, settings: Sequence[str]) -> dict[str, float]:
        """A whole run, and how fast it was."""
        mx.disable_compile()  # as mlx-train does on the CPU
        config, comm = load_config(Path(config_file), settings), self.comm("grpc")
        loaded = load_all(config, comm)
        state = init_state(loaded.model, config, comm)
        trainer = Trainer(Phases(config, loaded.plan, loaded.rows.train))
        seconds, num_bytes, infos = self.measured(lambda: list(trainer.steps(state, Mesh(dp=comm))))
        num_tokens = sum(info.num_tokens for info in infos)
        return {"tokens_per_s": num_tokens / seconds, "bytes_per_step": num_bytes / len(infos)}

    def overlap(self, ratio: float, num_rounds: int) -> dict[str, list[float]]:
        """See `overlap.py`."""
        self.ring()
        return time_sides(self.comm("grpc"), ratio, num_rounds)

    def _addresses(self, name: str) -> list[str]:
        return [f"10.0.0.{rank + 1}:{PORTS[name]}" for rank in range(len(self._rates_mbit))]


def reduction(comm: Communicator, layout: Sequence[BucketLayout], arrays: dict[str, Any]) -> Run:
    """An all_reduce of arrays that are ready."""
    own = [{(comm.rank, comm.rank + 1): bucket} for bucket in to_buckets(layout, arrays)]
    return lambda: mx.eval(comm.all_reduce(layout, comm.size, own, "the benchmark"))


def sent_bytes() -> int:
    """By this namespace so far: with headers (of what the link cuts up, once), and with what was sent again."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="ascii"))


def main(fd: int, rank: int, *rates_mbit: int) -> None:
    """Answer the messages of `networks.py` until it has no more."""
    control, joined = Control(socket.socket(fileno=fd)), Rank(rank, rates_mbit)
    while (message := control.receive()) is not None:
        control.send(**getattr(joined, message.pop("what"))(**message))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    os._exit(0)  # The groups are not left: all ranks end here.
