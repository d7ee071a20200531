"""One replica under torchft, or with `--plain` one rank of PyTorch's own DDP over Gloo; run in PyTorch's environment.

It is set up as the README of torchft and its `train_ddp.py` have it: `DistributedDataParallel` and `Optimizer` around a
model, `ProcessGroupGloo` with 5 s, a `Manager` with 10 s and all else as it comes. An iteration computes on a batch of
its own and sleeps through the rest of `--seconds`. A line of `--log` is: when the iteration was over, the step that it
was of, whether it was committed, and how many replicas took part; the last line is a digest of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import nn

SIDE = 256
"""Of the square matrices that the model consists of."""
BATCH = 8


def digest(model: nn.Module) -> str:
    """Of the weights."""
    # Not through NumPy, which torch does without.
    data = b"".join(bytes(array.detach().flatten().view(torch.uint8).tolist()) for array in model.parameters())
    return hashlib.sha256(data).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lighthouse", help="its address")
    parser.add_argument("--plain", type=int, help="number of ranks, of which --rank is one, that meet at --store")
    parser.add_argument("--store", help="a file")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of an iteration")
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = max(round(options.parameters / (SIDE * SIDE + SIDE)), 1)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(layers)))
    with options.log.open("a", buffering=1, encoding="utf-8") as log:
        (train_plain if options.plain else train_managed)(options, model, log)
        log.write(f"digest {digest(model)}\n")


def compute(model: nn.Module, step: int, rank: int, seconds: float) -> None:
    """A gradient, which is reduced on the way."""
    begun_s = time.monotonic()
    batch = torch.randn(BATCH, SIDE, generator=torch.Generator().manual_seed(step * 1000 + rank))
    loss = model(batch).square().mean()
    # Before the backward pass, as that is what the reduction overlaps with, and here takes next to no time.
    time.sleep(max(begun_s + seconds - time.monotonic(), 0.0))
    loss.backward()


def train_plain(options: argparse.Namespace, model: nn.Module, log: TextIO) -> None:
    """Without fault tolerance."""
    dist.init_process_group("gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=options.plain)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(options.num_steps):
        optimizer.zero_grad()
        compute(parallel, step, options.rank, options.seconds)
        optimizer.step()
        log.write(f"{time.monotonic()} {step + 1} 1 {options.plain}\n")


def train_managed(options: argparse.Namespace, model: nn.Module, log: TextIO) -> None:
    """With replicas that come and go."""
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    inner = torch.optim.AdamW(model.parameters())
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, dict]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        replica_id=f"replica_{options.rank}",
        timeout=timedelta(seconds=10),
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=options.lighthouse,
    )
    parallel = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, inner)
    while manager.current_step() < options.num_steps:
        step = manager.current_step()
        optimizer.zero_grad()
        compute(parallel, step, options.rank, options.seconds)
        optimizer.step()
        now = manager.current_step()
        log.write(f"{time.monotonic()} {max(now, step + 1)} {int(now > step)} {manager.num_participants()}\n")
    manager.shutdown()


if __name__ == "__main__":
    main()
