"""`mlx-distributed import-config` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.train import main as train
from mlx_distributed.config import load_config

AXOLOTL = """\
base_model: org/model
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: yes
datasets:
  - {path: org/rows, type: alpaca}
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2e-4
loraplus_lr_ratio: 16
odd_key: 1
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "qlora.yml"
    path.write_text(AXOLOTL)
    return path


def test_a_file_is_written_that_mlx_train_takes(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-config", str(theirs), "--devices", "2", "--output", "my.yaml"]) == 0
    printed = capsys.readouterr()
    assert "qlora.yml is for Axolotl and has 12 keys: 10 mapped, 0 refused, 2 no counterpart" in printed.out
    assert "odd_key: 1: is not known here" in printed.out
    assert "loraplus_lr_ratio: 16: one rate serves all" in printed.out
    assert "written: my.yaml" in printed.out
    assert printed.err == ""
    text = Path("my.yaml").read_text()
    assert text.startswith("# Imported from qlora.yml, a configuration of Axolotl.\n# No counterpart here:\n")
    assert "rank: 16  # lora_r\n" in text
    config = load_config(Path("my.yaml"))
    assert config.lora.target_modules == "all-linear"
    assert config.train.global_batch_size == 16
    assert train(["--config", "my.yaml", "--print-config"]) == 0
    assert "global_batch_size: 16" in capsys.readouterr().out


def test_without_output_the_file_goes_where_it_can_be_piped(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-config", "--from", "axolotl", str(theirs)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("# Imported from qlora.yml")
    assert printed.err.startswith("qlora.yml is for Axolotl")


def test_another_training_is_refused(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs.write_text(AXOLOTL + "rl: dpo\nlisa_n_layers: 4\n")
    assert main(["import-config", str(theirs), "--output", "my.yaml"]) == 2
    printed = capsys.readouterr()
    assert "changes what is trained, and is not here\n  rl: dpo: trains on preferences" in printed.out
    assert "something else would be trained: rl, lisa_n_layers. Nothing was written; give --force" in printed.err
    assert not Path("my.yaml").exists()
    assert main(["import-config", str(theirs), "--output", "my.yaml", "--force"]) == 0
    assert "# Changes what is trained, and is not here:\n#   rl: dpo" in Path("my.yaml").read_text()


def test_what_is_missing_is_said(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs.write_text("base_model: ./nowhere\nlearning_rate: -1\n")
    assert main(["import-config", str(theirs), "--output", "my.yaml"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Set by hand before it can be trained:\nmy.yaml:")
    assert "there is nothing at" in printed
    assert "data.train: no training data are given" in printed
    assert "must be above 0" in printed
    assert Path("my.yaml").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("- 1", "the top level is [1]"),
        ("a: [", "not valid YAML"),
        ("a: &a [*a]", "refers to itself"),
        ("rl: dpo\nrl: kto", "the key stands on line 1 too"),
        ("base_model: !!python/object:os.system x", "not valid YAML"),
        ("[a]: 1", "a key that is not text"),
        ("compute_environment: LOCAL\ndebug: false\n", "configures no training of Axolotl"),
        ("colour: red", "none of its keys is known"),
    ],
)
def test_a_file_that_is_none(theirs: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs.write_text(text)
    assert main(["import-config", str(theirs)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


def test_bad_arguments(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-config", "nowhere.yml"]) == 2
    assert "nowhere.yml" in capsys.readouterr().err
    assert main(["import-config", str(theirs), "--devices", "0"]) == 2
    assert "--devices 0" in capsys.readouterr().err
    assert main(["import-config", str(theirs), "--output", str(theirs)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert theirs.read_text() == AXOLOTL
    assert main(["import-config", str(theirs), "--output", "nowhere/my.yaml"]) == 2
    assert "cannot be written" in capsys.readouterr().err
