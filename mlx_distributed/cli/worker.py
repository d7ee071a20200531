"""The program of one worker on this machine: `python -m mlx_distributed.cli.worker FD`, started by `local` only."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import describe
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.run import Job, train
from mlx_distributed.comm.group import join_group
from mlx_distributed.config import load_config


def main(fd: int) -> int:
    """Take a job over the line, join the group, train."""
    control = Control(socket.socket(fileno=fd))
    message = control.receive()
    if message is None:
        return 1
    interrupt = Interrupt()
    status, error = describe(lambda: _work(message, control, interrupt), debug=message["debug"])
    if error is not None:
        if message["rank"]:  # Its output is its log file. What rank 0 says stands on the console, said by the parent.
            print(f"error: {error}", flush=True)
        control.send(error=error)
    return status


def _work(message: Mapping[str, Any], control: Control, interrupt: Interrupt) -> int:
    config = load_config(Path(message["config_file"]))
    rank, parallel = message["rank"], config.parallel

    def exchange(address: str) -> list[str]:
        control.send(address=address)
        answer = control.receive()
        if answer is None:
            os._exit(1)
        control.exit_with_parent()
        return list(answer["addresses"])

    listen = f"127.0.0.1:{parallel.port + rank if parallel.port else 0}"
    comm = join_group(rank, parallel.nproc, message["secret"], parallel.timeout_s, listen, exchange)
    return train(Job(config, message["run_id"], message["wandb_id"], message["resume"]), comm, interrupt)


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries that are still about (the transport of a lost peer, W&B) must not hold up the end.
    os._exit(code)
