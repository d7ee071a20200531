"""A run that `mlx.launch` has started: this process is one rank already, and no worker is spawned."""

from __future__ import annotations

import json

from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.machine.machine import this_machine
from mlx_distributed.cli.output_dir import open_output_dir
from mlx_distributed.cli.run import Job, train
from mlx_distributed.comm.native import NativeComm
from mlx_distributed.config import Config
from mlx_distributed.train.agreement import broadcast_bytes


def run_native(config: Config, resume: str | None) -> int:
    """Be one rank; returns the exit status. Rank 0 owns the output folder and tells the others who the run is."""
    comm = NativeComm()
    ids = None
    if comm.rank == 0:
        record = open_output_dir(config, resume is not None)
        ids = json.dumps([record.run_id, record.wandb_id]).encode()
    run_id, wandb_id = json.loads(broadcast_bytes(ids, comm, "the id of the run"))
    with this_machine().awake():
        return train(Job(config, run_id, wandb_id, resume, log=False), comm, Interrupt())
