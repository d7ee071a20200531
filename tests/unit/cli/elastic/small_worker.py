"""A worker that computes nothing: it takes part in a run, votes, and ends as `PLAN_<rank>` in its environment says.

`refuse`: the data. `die`: before it has enrolled. `die at N`: in step N, and `die once at N` unless it was started
again. `wait for N`: take the first step in no epoch of fewer, and `stay with N` no step.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

from mlx_distributed import __version__
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.errors import describe
from mlx_distributed.cli.interrupt import Interrupt
from mlx_distributed.comm.tls import Identity
from mlx_distributed.elastic.membership import Membership
from mlx_distributed.elastic.protocol import START, Facts, WorkerId
from mlx_distributed.elastic.worker import View
from mlx_distributed.errors import DataError, TrainingError

NUM_STEPS = 4
DIGEST = "digest"


def take_part(job: dict[str, Any], control: Control) -> int:
    seat, plan = job["seat"], os.environ.get(f"PLAN_{job['rank']}", "")
    if plan == "refuse":
        raise DataError("these rows are of no use")
    if plan == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    coordinator = control.enroll(num_steps=NUM_STEPS, config_digest=DIGEST, begins_with=START)
    config_file = Path(job["config_file"])
    if job["seat"]["first"]:
        config_file.replace(config_file.with_name("config.yaml"))
    stays = plan.startswith("stay with")
    num_wanted = int(plan.split()[-1]) if plan.startswith("wait for") or stays else 1
    host = seat["listen"].rpartition(":")[0]
    with socket.create_server((host, 0)) as listener:
        facts, view = Facts(job["run_id"], __version__, DIGEST), View(WorkerId(seat["name"], uuid.uuid4().hex))
        identity = seat["identity"] and Identity(**seat["identity"])
        address = f"{host}:{listener.getsockname()[1]}"
        membership = Membership(coordinator, seat["token"], facts, view, address, identity)
        try:
            while (view := membership.view).committed.step < NUM_STEPS:
                if view.ended is not None:
                    raise TrainingError(view.ended.reason)
                if view.offer is not None:
                    membership.change(lambda v: v.fetched(v.offer.outcome) if v.offer else v)
                elif (
                    view.epoch
                    and view.prepared is None
                    and ((view.committed.step and not stays) or len(view.epoch.seats) >= num_wanted)
                ):
                    once = f"die once at {view.committed.step}" if not job["halvings"] else None
                    if plan in (f"die at {view.committed.step}", once):
                        os.kill(os.getpid(), signal.SIGKILL)
                    epoch = view.epoch.id
                    membership.change(lambda v, epoch=epoch: v.prepare(epoch, f"d{v.committed.step + 1}"))
                seen = membership.view
                membership.wait(lambda v, seen=seen: v != seen or v.ended or v.offer, 0.2)
        finally:
            membership.close("done")
    return 0


def main(fd: int) -> int:
    control = Control(socket.socket(fileno=fd))

    def work() -> int:
        Interrupt()
        return take_part(control.receive() or {}, control)

    status, error = describe(work, debug=False)
    if error is not None:
        control.send(error=error)
    return status


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)
