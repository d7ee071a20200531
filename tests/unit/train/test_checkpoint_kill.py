"""Real processes that are killed, or find the disk full, while they save."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import arrays, names, no_notice, save

from mlx_distributed.train.checkpoint import newest_valid
from mlx_distributed.train.state import digest

PROGRAM = Path(__file__).with_name("save_checkpoints.py")

# Where the program is when it is killed, as seen from outside: the kill comes a little later. Each moment comes again
# and again, or lasts, so that none can be missed.
MOMENTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "folder made": ("save_forever", lambda folder: [*folder.glob(".step-*.tmp")]),
    "parameters": ("save_forever", lambda folder: [*folder.glob(".step-*.tmp/params.safetensors")]),
    "optimizer": ("save_forever", lambda folder: [*folder.glob(".step-*.tmp/optimizer.safetensors")]),
    "manifest": ("save_forever", lambda folder: [*folder.glob(".step-*.tmp/manifest.json")]),
    "in place": ("save_forever", lambda folder: (folder / "step-00000003").exists()),
    "removing": ("save_forever", lambda folder: not (folder / "step-00000001").exists()),
    "replacing": ("save_again_forever", lambda folder: (folder / ".step-00000001.old").exists()),
    "saving again": ("save_again_forever", lambda folder: (folder / ".step-00000001.tmp" / "manifest.json").exists()),
}


@pytest.mark.parametrize(("program", "is_there"), MOMENTS.values(), ids=MOMENTS)
def test_a_killed_save_leaves_a_whole_checkpoint(
    tmp_path: Path, program: str, is_there: Callable[[Path], object]
) -> None:
    with subprocess.Popen([sys.executable, PROGRAM, program, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        while not ([*tmp_path.glob("step-*")] and is_there(tmp_path)):
            assert process.poll() is None
        process.kill()
        printed = [int(line) for line in process.communicate()[0].split("\n") if line]
    newest = newest_valid(tmp_path, no_notice)
    assert newest is not None
    step = newest.meta.step
    assert step >= max(printed, default=1)
    assert [digest(loaded) for loaded in newest.load()] == [digest(saved) for saved in arrays(step, 1 << 20)]
    save(tmp_path, step + 1)
    assert all(name.startswith("step-") for name in names(tmp_path))
    assert f"step-{step:08d}" in names(tmp_path)


def test_a_full_disk_is_said_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "fill_the_disk", tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    said = done.stdout.removesuffix("\n")
    assert "\n" not in said
    assert f"the checkpoint of step 2 could not be saved in {tmp_path}: File too large. It takes 4.0 MB, and " in said
    assert said.endswith("go on with --resume from the last whole checkpoint (step-00000001)")
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
