"""Whatever is wrong is said in one paragraph, with the right exit status, and nothing already saved is lost."""

from __future__ import annotations

import json
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load
from support import NUM_STEPS, Run, checkpoints, digest, free_ports, metrics, steps, train

from mlx_distributed.cli.train import main

# Refused by the command itself, which starts no worker and does not even import MLX.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.micro_batch=2"], "train.micro_batch=2: unknown key; did you mean train.micro_batch_size?"),
        (["train.max_steps=ten"], "train.max_steps=ten: must be a whole number or null"),
        (["train.micro_batch_size=5"], "must divide train.global_batch_size=12; use 1, 2, 3, 4, 6 or 12"),
        (["--nproc", "0"], "parallel.nproc=0: no worker would run; use 1 for a single one, or more"),
        (["--nproc", "7"], "a step has only 6 micro-batches"),
        (["data.train=gone.jsonl"], "data.train.0.path=gone.jsonl: there is nothing at "),
        (["model.path=./gone"], "model.path=./gone: there is nothing at "),
    ],
)
def test_a_wrong_configuration(config: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = train(config, *arguments, "--output-dir", tmp_path / "out")
    assert done.status == 2
    assert words in done.error
    assert not (tmp_path / "out").exists()


def test_every_problem_is_told_at_once(config: Path, tmp_path: Path) -> None:
    done = train(config, "train.max_steps=0", "lora.rank=0", "seed=-1", "--output-dir", tmp_path / "out")
    assert done.status == 2
    assert "has 3 problems" in done.error
    assert len(done.error.splitlines()) == 4


def test_a_missing_configuration(tmp_path: Path) -> None:
    done = train(tmp_path / "gone.yaml")
    assert done.status == 2
    assert "gone.yaml: No such file or directory" in done.error


def test_the_folder_of_another_run(config: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    done = train(config, "--output-dir", undisturbed)
    assert done.status == 2
    assert "holds a run already; add --resume to go on with it, or take another --output-dir" in done.error
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_a_folder_of_other_things(config: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = train(config, "--output-dir", tmp_path)
    assert done.status == 2
    assert "is not empty and holds no run of this program" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# Data and models that are refused once they are read: by `--dry-run` here, which reads them in this very process.

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
WIZARD = {"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}
DATA: dict[str, tuple[bytes | list[object], str]] = {
    "empty": (b"", "holds no rows"),
    "not text": (b'{"a": "\xff\xfe"}\n', "cannot be read as UTF-8 text"),
    "not an object": ([GOOD, [1], "row"], "2 of 3 rows are invalid (2 row is not an object; the first: "),
    "unknown role": ([WIZARD], "rows.jsonl:1: unknown role: 'wizard'"),
    "no assistant": ([{"messages": GOOD["messages"][:1]}], "no assistant turn"),
    "of no known format": ([{"colour": "red"}], "colour"),
}


def dry_run(config: Path, *arguments: str) -> int:
    return main(["--config", str(config), "--dry-run", *arguments])


@pytest.mark.parametrize(("rows", "words"), DATA.values(), ids=DATA)
def test_wrong_data(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: bytes | list[object], words: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode())
    assert dry_run(config, f"data.train={file}", "data.val_fraction=0") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_no_trainable_token(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(config, "data.max_seq_length=5", "data.overlong=truncate") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: none of the ")
    assert "have no trainable token" in err


def without(*patterns: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("model*.safetensors"), "has no weights"),
        (without("config.json"), "has no config.json"),
        (without("chat_template*"), "has no chat template"),
    ],
    ids=["no weights", "no config", "no template"],
)
def test_a_wrong_model(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], words: str
) -> None:
    folder = Path(shutil.copytree(config.parent / "tied", tmp_path / "model"))
    damage(folder)
    assert dry_run(config, f"model.path={folder}") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


# Found by the workers, of whom only one may speak.


def test_what_all_workers_refuse_is_said_once(config: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(config.parent / "tied", tmp_path / "model"))
    without("model*.safetensors")(model)
    done = train(config, f"model.path={model}", "--nproc", "2", "--output-dir", tmp_path / "out")
    assert done.status == 2
    assert "has no weights" in done.error
    # Once the model is mended, the same command works: nothing of a run is there that could be lost.
    done = train(config, "train.max_steps=1", "--output-dir", tmp_path / "out")
    assert done.status == 0, done


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_in_use(config: Path, tmp_path: Path, rank: int) -> None:
    first = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + rank))
        taken.listen()
        done = train(config, "--nproc", "2", f"parallel.port={first}", "--output-dir", tmp_path / "out")
    assert done.status == 1
    assert f"cannot listen on 127.0.0.1:{first + rank}; is the port in use?" in done.error


def test_a_checkpoint_of_another_model(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    done = train(config, "--resume", f"model.path={config.parent / 'untied'}", "--output-dir", folder)
    assert done.status == 2
    assert "cannot go on from the checkpoint of step 20: model is " in done.error
    assert digest(folder) == digest(undisturbed)
    assert metrics(folder) == metrics(undisturbed)
    assert (folder / "config.yaml").read_text() == (undisturbed / "config.yaml").read_text()


def test_a_checkpoint_of_a_newer_program(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    manifest = checkpoints(folder)[-1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    done = train(config, "--resume", "--output-dir", folder)
    assert done.status == 2
    assert "was written with schema 2" in done.error
    assert [path.name for path in checkpoints(folder)] == [path.name for path in checkpoints(undisturbed)]
    assert metrics(folder) == metrics(undisturbed)


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """What is started here finds the disk full once a file has so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (
            f"checkpoints/step-{NUM_STEPS:08}",
            "the checkpoint of step 20 could not be saved in .*: File too large. It takes .* MB",
        ),
        ("final", "final could not be written"),
    ],
)
def test_a_full_disk(config: Path, undisturbed: Path, tmp_path: Path, lost: str, words: str) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    # As far as can be from refusing the smaller files that the processes write besides, such as a report of coverage.
    too_large = max(file.stat().st_size for file in (folder / lost).iterdir())
    shutil.rmtree(folder / lost)
    saved = digest(folder)
    with small_files(too_large - 1):
        run = Run(config, "--resume", "--output-dir", folder)
    with run:
        done = run.wait()
    assert done.status == 1
    assert re.search(words, done.error)
    assert digest(folder) == saved
    done = train(config, "--resume", "--output-dir", folder)
    assert done.status == 0, done
    assert digest(folder) == digest(undisturbed)
    assert (folder / "final" / "model.safetensors").exists()


# A loss that is not a number: the model breaks on a character that no row of the standard data has.

BROKEN = "\N{SECTION SIGN}"


@pytest.fixture(scope="module")
def broken_model(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(config.parent / "untied", tmp_path_factory.mktemp("broken") / "model"))
    _, tokenizer = load(str(folder))
    weights = mx.load(str(folder / "model.safetensors"))
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[mx.array(tokenizer.encode(BROKEN, add_special_tokens=False))] = mx.inf
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def break_rows(source: Path, target: Path, numbers: range) -> None:
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for number in numbers:
        rows[number]["messages"][0]["content"] += BROKEN
    target.write_text("\n".join(map(json.dumps, rows)))


def test_a_loss_that_is_not_finite_is_skipped(config: Path, broken_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    break_rows(config.parent / "rows.jsonl", rows, range(7, 8))
    same = [f"model.path={broken_model}", "method=lora", f"data.train={rows}", "data.val_fraction=0"]
    digests = set()
    for nproc in ("1", "2"):
        done = train(config, *same, "train.max_steps=5", "--nproc", nproc, "--output-dir", tmp_path / nproc)
        assert done.status == 0, done
        (bad,) = [line["step"] for line in metrics(tmp_path / nproc) if line["train/loss"] is None]
        assert f"step {bad}: the loss of micro-batch " in done.stdout
        assert done.stdout.count("is nan; the step is skipped\n") == 1
        assert steps(tmp_path / nproc) == [1, 2, 3, 4, 5]
        digests.add(digest(tmp_path / nproc))
    assert len(digests) == 1


def test_the_third_loss_in_a_row_that_is_not_finite_ends_the_run(
    config: Path, broken_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    break_rows(config.parent / "rows.jsonl", rows, range(50))
    same = [f"model.path={broken_model}", "method=lora", f"data.train={rows}", "data.val_fraction=0"]
    done = train(config, *same, "checkpoint.steps=2", "--nproc", "2", "--output-dir", tmp_path / "out")
    assert done.status == 1
    assert done.error.startswith("step 3: the loss of micro-batch 0 is nan. That was the 3rd step in a row")
    assert checkpoints(tmp_path / "out")[-1].name == "step-00000002"
    digest(tmp_path / "out")
