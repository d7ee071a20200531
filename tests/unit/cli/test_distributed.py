from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.nn as nn
import pytest

from mlx_distributed.cli.distributed import main
from mlx_distributed.parallel.adamw import DistributedAdamW
from mlx_distributed.train.checkpoint import Checkpointer, CheckpointMeta
from mlx_distributed.train.state import TrainState

COMMAND = [sys.executable, "-c", "from mlx_distributed.cli.distributed import main; raise SystemExit(main())"]


def save(folder: Path, step: int) -> TrainState:
    """A state, saved as a checkpoint of an output_dir."""
    model = nn.Linear(3, 2)
    state = TrainState(model, DistributedAdamW().init(dict(model.parameters())), step)
    meta = CheckpointMeta(step, 0, 0, "run", None, {}, {})
    Checkpointer(folder / "checkpoints", None, False, print).save(state.parameters, state.optimizer, meta)
    return state


def lines(state: TrainState) -> str:
    digest = state.digest()
    return f"{digest['params']}  params\n{digest['optimizer']}  optimizer\n"


def test_digest_is_that_of_the_state_when_it_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {step: save(tmp_path, step) for step in (1, 2)}
    for path, step in (
        (tmp_path, 2),
        (tmp_path / "checkpoints", 2),
        (tmp_path / "checkpoints" / "step-00000001", 1),
    ):
        assert main(["digest", str(path)]) == 0
        assert capsys.readouterr() == (lines(states[step]), "")


def test_digest_names_what_it_passes_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert main(["digest", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == lines(state)
    assert err.startswith("passed over: ")
    assert "step-00000002" in err
    assert err.count("\n") == 1


def test_digest_of_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digest", str(tmp_path)]) == 1
    assert capsys.readouterr() == (
        "",
        f"error: {tmp_path} is not a whole checkpoint: manifest.json: No such file or directory\n",
    )
    assert main(["digest", str(tmp_path), "--debug"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_digest_of_a_newer_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    assert main(["digest", str(tmp_path)]) == 2
    assert "update it" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["digest", "--help"]])
def test_help_has_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "\n  mlx-distributed digest outputs/quickstart\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["digest"], ["digset", "x"]])
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_values_may_be_changed_before_and_after_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: model}\ndata: {train: rows.json}\n")
    assert main(["doctor", "seed=first", "--config", str(file), "seed=last", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert "seed=last" in error
    assert "nonsense: is not of the form" in error


def test_as_a_program(tmp_path: Path) -> None:
    state = save(tmp_path, 1)
    done = subprocess.run([*COMMAND, "digest", tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, lines(state), "")


def test_a_reader_that_has_gone_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "digest", tmp_path], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
