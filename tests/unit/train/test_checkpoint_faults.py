"""Whatever is wrong with a checkpoint is named in one paragraph, and an older one is taken."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import FACTS, meta, no_notice, save
from hypothesis import given
from hypothesis import strategies as st

from mlx_distributed.errors import CheckpointError, ConfigError
from mlx_distributed.train.checkpoint import best, newest_valid, open_checkpoint


def truncate(folder: Path) -> None:
    os.truncate(folder / "params.safetensors", 100)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "optimizer.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "optimizer.safetensors").write_bytes(data)


def link_out(folder: Path) -> None:
    (folder / "params.safetensors").rename(folder.parent / "elsewhere")
    (folder / "params.safetensors").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def manifest_text(text: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def in_manifest(path: str, value: object) -> Callable[[Path], None]:
    """Set the entry at a slash-separated path; an Ellipsis removes it."""

    def change(folder: Path) -> None:
        record = json.loads((folder / "manifest.json").read_text())
        *parents, last = path.split("/")
        entry = record
        for name in parents:
            entry = entry[name]
        if value is ...:
            del entry[last]
        else:
            entry[last] = value
        (folder / "manifest.json").write_text(json.dumps(record))

    return change


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated file": (truncate, "params.safetensors has 100 bytes instead of"),
    "flipped bit": (flip_a_bit, "optimizer.safetensors does not have the SHA-256"),
    "missing file": (lambda f: (f / "params.safetensors").unlink(), "params.safetensors: No such file"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
    "link": (link_out, "params.safetensors is not a regular file"),
    "pipe": (pipe, "manifest.json is not a regular file"),
    "renamed": (in_manifest("meta/step", 7), "misnamed: manifest.json says step 7"),
    "empty manifest": (manifest_text(""), "is not JSON"),
    "binary manifest": (manifest_text(bytes(range(256))), "is not JSON"),
    "deep manifest": (manifest_text("[" * 100_000), "is not JSON"),
    "long number": (manifest_text("9" * 100_000), "is not JSON"),
    "large manifest": (manifest_text(" " * (17 << 20)), "more than 16777216 bytes"),
    "list": (manifest_text("[1]"), "no schema version"),
    "no schema": (in_manifest("schema_version", ...), "no schema version"),
    "schema 0": (in_manifest("schema_version", 0), "no schema version"),
    "schema True": (in_manifest("schema_version", True), "no schema version"),
    "no files": (in_manifest("files", ...), "just the entries schema_version, files, meta"),
    "files of another type": (in_manifest("files", ["params.safetensors"]), "entries params.safetensors, optimizer"),
    "path escape": (
        in_manifest("files", {"../secret": {}, "/etc/passwd": {}}),
        "entries params.safetensors, optimizer",
    ),
    "rank 1 without rank 0": (
        in_manifest("files/rank-0001.safetensors", {"num_bytes": 0, "sha256": ""}),
        "entries params.safetensors, optimizer.safetensors, rank-0000.safetensors in files",
    ),
    "missing file of a rank": (
        in_manifest("files/rank-0000.safetensors", {"num_bytes": 0, "sha256": ""}),
        "rank-0000.safetensors: No such file",
    ),
    "file entry": (in_manifest("files/params.safetensors", 3), "just the entries num_bytes, sha256"),
    "negative size": (in_manifest("files/params.safetensors/num_bytes", -1), "no size and hash of params"),
    "huge size": (in_manifest("files/params.safetensors/num_bytes", 10**400), "no size and hash of params"),
    "hash type": (in_manifest("files/params.safetensors/sha256", None), "no size and hash of params"),
    "other hash": (in_manifest("files/params.safetensors/sha256", "../x"), "does not have the SHA-256"),
    "unknown entry": (in_manifest("meta/pickle", "x"), "just the entries step"),
    "step": (in_manifest("meta/step", 1e300), "cannot be right: step"),
    "huge step": (in_manifest("meta/step", 1 << 70), "cannot be right: step"),
    "tokens": (in_manifest("meta/num_tokens", "many"), "cannot be right: num_tokens"),
    "skipped": (in_manifest("meta/num_skipped", False), "cannot be right: num_skipped"),
    "run id": (in_manifest("meta/run_id", 1), "cannot be right: run_id"),
    "wandb id": (in_manifest("meta/wandb_id", {}), "cannot be right: wandb_id"),
    "facts": (in_manifest("meta/facts", {"data": 3}), "cannot be right: facts"),
    "metrics": (in_manifest("meta/metrics", {"eval/loss": float("nan")}), "cannot be right: metrics"),
    "version": (in_manifest("meta/program_version", None), "cannot be right: program_version"),
}


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_the_checkpoint_passed_over(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    older = save(tmp_path, 1, metrics={"eval/loss": 9.0})
    newest = save(tmp_path, 2, metrics={"eval/loss": 8.0})
    change(newest)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(newest)
    assert said in str(error.value)
    assert str(newest) in str(error.value)
    assert "\n" not in str(error.value)
    for choose in (newest_valid, best):
        notices: list[str] = []
        found = choose(tmp_path, notices.append)
        assert found is not None
        assert found.folder == older
        assert notices == [f"passed over: {error.value}"]


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_no_manifest_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_a_newer_schema_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, metrics={"eval/loss": 9.0})
    newest = save(tmp_path, 2, metrics={"eval/loss": 8.0})
    record = {"schema_version": 2, "of": "the future"}
    (newest / "manifest.json").write_text(json.dumps(record))
    for choose in (open_checkpoint, lambda _: newest_valid(tmp_path, no_notice), lambda _: best(tmp_path, no_notice)):
        with pytest.raises(ConfigError, match=r"step-00000002 was written with schema 2.*pip install --upgrade"):
            choose(newest)


def test_files_whose_hash_is_right_but_that_mlx_cannot_read(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 16] * 4, "data_offsets": [0, 0]}}).encode()
    overflow = struct.pack("<Q", len(header)) + header
    for data, said in ((b"garbage", "that MLX can read"), (overflow, "cannot have the shape")):
        folder = save(tmp_path, 1)
        (folder / "params.safetensors").write_bytes(data)
        in_manifest("files/params.safetensors", {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})(
            folder
        )
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(folder).load()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    checkpoint = open_checkpoint(folder)
    (folder / "params.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"params.safetensors cannot be read: No such file"):
        checkpoint.verify()


def test_a_checkpoint_of_other_facts_is_refused() -> None:
    meta(3).check_facts(dict(FACTS))
    other = {"model": "f" * 64, "batches": '{"seed": 2}', "new": "x"}
    with pytest.raises(ConfigError) as error:
        meta(3).check_facts(other)
    for part in (
        "checkpoint of step 3",
        "model is eeeeeeeeeeee there and ffffffffffff here",
        'batches is {"seed": 1} there and {"seed": 2} here',
        "new is missing there and x here",
        "data is dddddddddddd there and missing here",
    ):
        assert part in str(error.value)
