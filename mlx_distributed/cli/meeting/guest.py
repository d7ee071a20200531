"""A machine that comes to a group which another one has begun."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from mlx_distributed import __version__
from mlx_distributed.cli.control import Control
from mlx_distributed.cli.elastic.crew import hostname
from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.elastic.reach import dial, local_host
from mlx_distributed.cli.meeting.host import WAIT_S
from mlx_distributed.cli.meeting.place import LINE_S, Place, What
from mlx_distributed.errors import ConfigError, MlxDistributedError


def come(
    invitation: Invitation,
    what: What,
    num_workers: int = 1,
    host: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Control, Place]:
    """Join a group; returns the line to its first machine, and the place of this one, when all are there.

    Args:
        invitation: to it.
        what: it should gather for.
        num_workers: that this machine brings.
        host: address on which they will listen; None takes that of the interface which reaches the first machine.
        tell: is given a line for people when this machine is let in.

    Raises:
        ConfigError: the join string is of something else, or this machine was refused.
        TrainingError: nobody answers.
        MlxDistributedError: the first machine has given up.
    """
    if invitation.kind != "group":
        raise ConfigError(
            f"this join string is of an elastic run, and not of a {what} of machines that are all there from the "
            "beginning; that is for mlx-train --join"
        )
    address, line = invitation.address, dial(invitation)
    control = Control(line)
    try:
        line.settimeout(LINE_S)
        control.send(
            token=invitation.token,
            program_version=__version__,
            mlx_version=version("mlx"),
            what=what,
            name=hostname(),
            host=host or local_host(line),
            num_workers=num_workers,
        )
        answer = control.receive() or {}
        if "program_version" in answer:
            raise ConfigError(
                f"the {what} at {address} is of mlx-distributed {answer['program_version']}, and this is "
                f"{__version__}: install that version here"
            )
        if "refused" in answer:
            raise ConfigError(f"the first machine, at {address}, refuses this one: {answer['refused']}")
        if "welcome" not in answer:
            raise ConfigError(
                f"who listens on {address} lets nobody into a {what} with this join string; take the one that it has "
                "printed last"
            )
        tell(f"the {what} at {address} begins when all workers are there")
        line.settimeout(WAIT_S + LINE_S)
        message = control.receive()
        if message is None:
            raise MlxDistributedError(f"the {what} at {address} has ended before all workers were there")
    except BaseException:
        control.close()
        raise
    line.settimeout(LINE_S)
    return control, Place(**message)
