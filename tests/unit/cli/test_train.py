from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import CONFIG, write_rows, write_workspace

from mlx_distributed.cli.train import main

PRINT = "--print-config"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def printed(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, dict]:
    """What the command prints as YAML."""
    assert main(["--config", str(config), *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return yaml.safe_load(out)


def test_the_printed_configuration_is_whole_and_makes_itself(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = printed(config, capsys, PRINT, "train.epochs=3")
    assert resolved["train"]["epochs"] == 3.0
    assert resolved["optimizer"]["betas"] == [0.9, 0.999]
    assert resolved["output_dir"] == str(tmp_path / "out")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolved))
    assert printed(again, capsys, PRINT) == resolved
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=5", "train.epochs=3", PRINT],
        [PRINT, "seed=5", "--nproc", "2", "train.epochs=3"],
        ["seed=5", "--resume", "--debug", PRINT, "train.epochs=3"],
        ["seed=5", PRINT, "--resume", "train.epochs=3"],
        ["--resume", "seed=5", PRINT, "train.epochs=3"],
        ["--resume", "best", PRINT, "seed=5", "train.epochs=3"],
        ["--resume=last", "seed=5", PRINT, "train.epochs=3"],
        ["seed=5", PRINT, "train.epochs=2", "--resume", "train.epochs=3"],
    ],
    ids=" ".join,
)
def test_overrides_may_stand_anywhere(config: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    resolved = printed(config, capsys, *arguments)
    assert (resolved["seed"], resolved["train"]["epochs"]) == (5, 3.0)


def test_a_folder_named_like_an_override_can_be_resumed_from(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed=5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert printed(config, capsys, PRINT, "--resume", "seed=5")["seed"] == 0


def test_options_of_their_own_win_over_overrides(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nproc", "2", "--output-dir", tmp_path / "mine", "parallel.nproc=1", "output_dir=other"]
    resolved = printed(config, capsys, PRINT, *arguments)
    assert (resolved["parallel"]["nproc"], resolved["output_dir"]) == (2, str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "0"], "parallel.nproc=0"),
        (["--nproc", "two"], "parallel.nproc=two"),
        (["train.no_such=1"], "train.no_such=1: unknown key"),
        (["--resume", "train.no_such=1"], "train.no_such=1: unknown key"),
        (["epochs"], "epochs"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(
    config: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ([PRINT], ["--dry-run"], []):
        assert main(["--config", str(config), *arguments, *command]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: The configuration ")
        assert said in err
    assert main(["--config", str(config), "--debug", *arguments]) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    assert {path.name for path in config.parent.iterdir()} == {"config.yaml", "rows.jsonl"}


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "x.yaml", "--nporc", "2"]], ids=str)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mlx-train")


def test_help_has_examples_and_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "\n  mlx-train --config configs/quickstart.yaml\n" in out
    assert "130 interrupted, after saving" in out


def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_workspace(tmp_path)
    before = set(tmp_path.rglob("*"))
    arguments = ["--dry-run", "--nproc", "3", "parallel.share=[1, 4, 1]"]
    assert main(["--config", str(config), *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-5:] == [
        "20 steps of 12 rows, 4 steps per epoch",
        "worker 0: 1 of the 6 micro-batches of a step",
        "worker 1: 4 of the 6 micro-batches of a step",
        "worker 2: 1 of the 6 micro-batches of a step",
        "the configuration and the data are fine; run again without --dry-run to train",
    ]
    assert set(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_stream_writes_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_workspace(tmp_path)
    before = set(tmp_path.rglob("*"))
    stream = ["data.streaming=true", "data.val_fraction=0", "train.micro_batch_size=4"]
    stream += ["train.micro_batch_tokens=512", "data.max_seq_length=512"]
    assert main(["--config", str(config), "--dry-run", *stream]) == 0
    assert "worker 0: " in capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before


def test_a_mistake_is_told_without_importing_mlx(config: Path) -> None:
    code = (
        "import sys; from mlx_distributed.cli.train import main; main(sys.argv[1:]); print('mlx.core' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--config", config, "--nproc", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr.startswith("error: ")) == ("False\n", True)
