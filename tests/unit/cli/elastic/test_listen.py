"""Where an elastic run listens: an interface by its name, for who opens a run and for who joins one."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_command import open_config

from mlx_distributed.cli.elastic.access import prepare_access
from mlx_distributed.cli.machine.machine import this_machine
from mlx_distributed.cli.train import main
from mlx_distributed.errors import ConfigError


def test_a_coordinator_listens_on_the_interface_that_is_named(tmp_path: Path) -> None:
    name = next(each.name for each in this_machine().interfaces() if each.kind == "loopback")
    config = open_config(tmp_path, f"elastic.listen={name}:4000")
    assert prepare_access(config, "run").address == "127.0.0.1:4000"
    with pytest.raises(ConfigError, match=r"elastic.listen=en77:0: en77 is neither .* \(127.0.0.1\)"):
        prepare_access(open_config(tmp_path, "elastic.listen=en77:0"), "run")


def test_who_joins_may_choose_an_interface_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--join", "mlxd1", "elastic.listen=en5"]) == 2
    assert "elastic.listen=en5: must be an address or an interface" in capsys.readouterr().err
    assert main(["--join", "mlxd1", "elastic.listen=en77:0"]) == 2
    assert "en77 is neither a host" in capsys.readouterr().err
    assert main(["--join", "mlxd1", "elastic.listen=127.0.0.1:0", "elastic.wait_s=3"]) == 2
    assert "error: elastic.wait_s=3 cannot stand beside --join" in capsys.readouterr().err
