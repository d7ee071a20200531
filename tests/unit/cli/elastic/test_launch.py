"""What `mlx-distributed launch` refuses before anything starts; launching itself is tested over a real sshd."""

from __future__ import annotations

from pathlib import Path

import pytest
from elastic_command import open_config

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.train import main as train


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hosts", "localhost"], "no other machine is named: mlx-train trains on this one"),
        (["--hosts", "localhost,b", "--nproc", "0"], "--nproc 0 keeps this machine from training, and it is named"),
        (["--hosts=-x"], "'-x' is not the name of a host"),
        (["--hostfile", "gone.json"], "--hostfile=gone.json cannot be read"),
        (["--hosts", "b", "--ssh", "no-such-program -F x"], "--ssh='no-such-program -F x': there is no such program"),
        (["--hosts", "b", "--ssh", ""], "--ssh='': there is no such program"),
        (["--hosts", "b", "--ssh", "ssh 'x"], '--ssh="ssh \'x": No closing quotation'),
        (
            ["--hosts", "no-such-host.invalid"],
            "by which address no-such-host.invalid reach this machine cannot be told",
        ),
        (["--hosts", "b", "--nproc", "-1"], "parallel.nproc=-1"),
        (["--hosts", "b", "elastic.listen=b"], "elastic.listen=b"),
    ],
)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    open_config(tmp_path)
    assert main(["launch", "--config", str(tmp_path / "config.yaml"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert not (tmp_path / "out").exists()


def test_attendance_is_for_standard_input(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--join", "mlxd1"], ["--config", "some.yaml"]):
        with pytest.raises(SystemExit):
            train([*arguments, "--attended"])
        assert "--attended only goes with --join -" in capsys.readouterr().err


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    assert "\n  mlx-distributed launch --hosts " in capsys.readouterr().out
