from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_distributed.cli.elastic.status import find, lines
from mlx_distributed.elastic.inquiry import (
    Description,
    MemberStatus,
    RunStatus,
    description_from_pb,
    description_to_pb,
    status_from_pb,
    status_to_pb,
)
from mlx_distributed.elastic.protocol import EpochId
from mlx_distributed.errors import ConfigError

STATUS = RunStatus(
    "0.1.0",
    "run",
    EpochId(2, 3),
    "b joined",
    7,
    20,
    "",
    (
        MemberStatus("a-0", "10.0.0.7:4000", True, 1.25, 7, 3.14159, 0.2, False, 118e6, 0.00042),
        MemberStatus("b", "10.0.0.8:4000", False, 0.75, 7, 0.0, 2.04, True),
        MemberStatus("newcomer", "10.0.0.9:4000", True, None, -1, 0.0, 0.0, False),
    ),
)
DESCRIPTION = Description("0.1.0", "run", "wandb", "seed: 0\n", "a key", "a certificate")


def test_the_table() -> None:
    assert list(lines(STATUS)) == [
        "run run, step 7 of 20",
        "epoch 2.3: b joined",
        "worker    address        share    micro-batches/s  link, Mbit/s  round trip, ms  step",
        "a-0       10.0.0.7:4000  1.25     3.14             944           0.4             7",
        "b         10.0.0.8:4000  0.75     -                -             -               7     "
        "not connected, waited for, silent for 2.0 s",
        "newcomer  10.0.0.9:4000  joining  -                -             -               -",
    ]


def test_a_run_that_waits() -> None:
    waiting = replace(STATUS, epoch=None, members=(), waiting="0 of at least 1 workers are ready", num_committed=0)
    assert list(lines(waiting)) == ["run run, step 0 of 20", "0 of at least 1 workers are ready", "no workers"]


@pytest.mark.parametrize("status", [STATUS, replace(STATUS, epoch=None, members=())])
def test_a_status_comes_over_the_wire(status: RunStatus) -> None:
    assert status_from_pb(status_to_pb(status)) == status


def test_a_description_comes_over_the_wire_and_hides_its_key() -> None:
    assert description_from_pb(description_to_pb(DESCRIPTION)) == DESCRIPTION
    assert "a key" not in repr(DESCRIPTION)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a join string nor the output_dir of an elastic run"):
        find(str(tmp_path))
    with pytest.raises(ConfigError, match="copy it again as a whole"):
        find("mlxd1abc")
