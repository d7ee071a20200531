"""Program for tests that kill it: saves checkpoints into a folder, and prints the step of each that was saved."""

from __future__ import annotations

import itertools
import resource
import sys
from pathlib import Path

import mlx.core as mx
from checkpoint_samples import arrays, checkpointer, meta

from mlx_distributed.errors import CheckpointError


def save_forever(folder: Path) -> None:
    """One step after the other."""
    for step in itertools.count(1):
        checkpointer(folder, save_total_limit=2).save(*arrays(step, 1 << 20), meta(step))
        print(step, flush=True)


def save_again_forever(folder: Path) -> None:
    """The same step, which is replaced as there are new metrics."""
    for loss in itertools.count(1):
        checkpointer(folder).save(*arrays(1, 1 << 20), meta(1, metrics={"eval/loss": loss}))
        print(1, flush=True)


def fill_the_disk(folder: Path) -> None:
    """A checkpoint of which the optimizer's file alone is too large."""
    checkpointer(folder).save(*arrays(1), meta(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        checkpointer(folder).save(arrays(2)[0], {"w.m": mx.zeros((1000, 1000))}, meta(2))
    except CheckpointError as error:
        print(error)
    checkpointer(folder).save(*arrays(3), meta(3))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
