"""`NativeComm` and `parallel.backend=native` on a group of two that `mlx.launch` starts, over MLX's ring."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from support import MLX_TRAIN, checkpoints, free_ports, metrics, train_all

SIZE = 2
LAUNCH = Path(sys.executable).with_name("mlx.launch")


def launch(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as every rank of a group."""
    group = [LAUNCH, "-n", str(SIZE), "--backend", "ring", "--starting-port", str(free_ports(SIZE))]
    return subprocess.run([*group, "--", *command], capture_output=True, text=True, check=False)


def test_every_call() -> None:
    done = launch(sys.executable, Path(__file__).with_name("native_rank.py"))
    assert sorted(done.stdout.splitlines()) == ["rank 0 is fine", "rank 1 is fine"], done
    assert done.returncode == 0


def arrays(output_dir: Path) -> Iterator[tuple[str, np.ndarray]]:
    for file in ("params", "optimizer"):
        loaded = mx.load(str(checkpoints(output_dir)[-1] / f"{file}.safetensors"))
        assert isinstance(loaded, dict)
        yield from ((name, np.asarray(array)) for name, array in sorted(loaded.items()))


def test_a_run(config: Path, tmp_path: Path) -> None:
    native, over_grpc = tmp_path / "native", tmp_path / "gRPC"
    short = ["train.max_steps=5", "checkpoint.steps=2"]  # The ring spins while it waits: slow on few cores.
    train_all(config, {over_grpc: [*short, "--nproc", "2"]})
    done = launch(MLX_TRAIN, "--config", config, *short, "--output-dir", native, "parallel.backend=native")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert {path.name for path in native.iterdir()} == {path.name for path in over_grpc.iterdir()}
    # One rank alone speaks and writes.
    assert done.stdout.count("step 5/5  loss ") == 1
    assert [line["step"] for line in metrics(native)] == [line["step"] for line in metrics(over_grpc)]
    # The sums are in another order, so the last bits may differ.
    for (name, found), (other, expected) in zip(arrays(native), arrays(over_grpc), strict=True):
        assert name == other
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
