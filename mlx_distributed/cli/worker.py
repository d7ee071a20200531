"""The program of one worker here: `python -m mlx_distributed.cli.worker FD [--debug]`, started by `local` only."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import describe
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.cli.machine.machine import Machine, this_machine

if TYPE_CHECKING:
    from mlx_distributed.config import Config

MAX_ERROR_CHARS = 4000
"""The parent reads an error when this process has ended, so that it must fit into the buffer of a socket."""


def main(fd: int, debug: bool, machine: Machine | None = None) -> int:
    """Take a job over the line, join the group, train.

    Args:
        fd: of the line.
        debug: print tracebacks.
        machine: that this runs on; None finds out.
    """
    control = Control(socket.socket(fileno=fd))
    message: dict[str, Any] = {}

    def work() -> int:
        interrupt = Interrupt()  # First of all: the parent has blocked the signals until somebody handles them.
        message.update(control.receive() or {})
        here = machine or this_machine()
        with here.awake():
            return _work(message, control, interrupt, here) if message else 1

    status, error = describe(work, debug)
    if error is not None:
        error = error[:MAX_ERROR_CHARS]
        if message.get("rank"):
            # Its output is its log file. What rank 0 has to say, the parent says on the console, once for all.
            print(f"error: {error}", flush=True)
        control.send(error=error)
    return status


def _work(message: Mapping[str, Any], control: Control, interrupt: Interrupt, machine: Machine) -> int:
    # These import MLX and mlx-lm, which takes a second, in which Ctrl-C must be handled already.
    gc.disable()
    from mlx_distributed.cli.run import Job, train
    from mlx_distributed.cli.stages import make_mesh
    from mlx_distributed.comm.group import join_group
    from mlx_distributed.comm.grpc_comm import GrpcComm
    from mlx_distributed.config import load_config
    from mlx_distributed.parallel.data import rank_weights

    gc.freeze()  # Nothing of what they have made is ever garbage, and to look for some takes 0.1 s each time.
    gc.enable()
    config = load_config(Path(message["config_file"]))
    if "seat" in message:
        return _work_elastic(config, message, control, interrupt, machine)
    place, parallel, secret = message["place"], config.parallel, message["secret"]
    host, machines = place["host"], place["machines"]
    identity = None
    if place["identity"] is not None:
        from mlx_distributed.comm.tls import Identity

        identity = Identity(**place["identity"])
    listen = f"{host}:{parallel.port + message['rank'] if parallel.port else 0}"
    bandwidths = rank_weights(parallel.bandwidth, parallel.size)
    rank = place["first_rank"] + message["rank"]
    comm = join_group(
        rank, parallel.size, secret, parallel.timeout_s, listen, control.exchange, bandwidths, identity=identity
    )
    if isinstance(comm, GrpcComm) and parallel.bandwidth == "auto" and len(set(machines)) > 1:
        from mlx_distributed.elastic.links import share_slices

        share_slices([0.0] * comm.size, comm)
    mesh = make_mesh(config, comm, secret, host, identity, machines)

    def on_saving() -> None:
        control.send(saving=True)

    job = Job(config, message["run_id"], message["wandb_id"], message["resume"], not place["quiet"], on_saving)
    if message["eval_only"]:
        from mlx_distributed.cli.eval_only import evaluate_only

        return evaluate_only(job, comm, mesh)
    return train(job, comm, interrupt, mesh)


def _work_elastic(
    config: Config, message: Mapping[str, Any], control: Control, interrupt: Interrupt, machine: Machine
) -> int:
    from mlx_distributed.cli.elastic.run import Seat, train_elastic
    from mlx_distributed.cli.run import Job
    from mlx_distributed.comm.tls import Identity

    def enroll(num_steps: int, config_digest: str, begins_with: tuple[int, str]) -> str:
        return control.enroll(num_steps=num_steps, config_digest=config_digest, begins_with=begins_with)

    place = dict(message["seat"])
    identity = place.pop("identity")
    seat = Seat(identity=None if identity is None else Identity(**identity), **place)
    job = Job(
        config, message["run_id"], message["wandb_id"], message["resume"], message["log"], halvings=message["halvings"]
    )
    status = train_elastic(job, seat, enroll, interrupt, machine)
    if status and interrupt.terminated:
        # The run goes on without this process, which has not ended it: it ends as any other does that gets SIGTERM.
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    return status


if __name__ == "__main__":
    code = main(int(sys.argv[1]), "--debug" in sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries that are still about (the transport of a lost peer, W&B) must not hold up the end.
    os._exit(code)
