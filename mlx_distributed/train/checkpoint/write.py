"""`Checkpointer`: writes checkpoints and removes old ones. Only rank 0 saves."""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import CheckpointError
from mlx_distributed.models.tensor_file import Arriving, write_tensors
from mlx_distributed.train.best import EVAL_LOSS, cost
from mlx_distributed.train.checkpoint.manifest import FILES, CheckpointMeta, FileEntry, Manifest, rank_file
from mlx_distributed.train.checkpoint.read import (
    MANIFEST,
    Checkpoint,
    Notice,
    best,
    locate,
    newest_valid,
    open_checkpoint,
    readable,
)


def retained(costs: Mapping[int, float | None], save_total_limit: int | None, keep_best: bool) -> set[int]:
    """The steps whose checkpoints stay: the newest `save_total_limit` (None: all), and the best one besides.

    Args:
        costs: by step, of what was evaluated there (`best.cost`); None where nothing was.
        save_total_limit: at least 1.
        keep_best: keep the step with the lowest cost, the first of equals.
    """
    keep = set(costs) if save_total_limit is None else set(sorted(costs)[-save_total_limit:])
    evaluated = [(cost, step) for step, cost in costs.items() if cost is not None]
    return keep | ({min(evaluated)[1]} if keep_best and evaluated else set())


@dataclass(frozen=True)
class Checkpointer:
    """The checkpoints of a run, in a folder that no other process writes to. Making one touches nothing."""

    folder: Path
    save_total_limit: int | None
    """Newest checkpoints to keep; None keeps all."""
    keep_best: bool
    """Keep the best one besides."""
    notice: Notice
    """Is told of torn and corrupted checkpoints that `find` passes over."""
    metric: str = EVAL_LOSS
    """By which one is the best."""

    def find(self, which: str) -> Checkpoint | None:
        """The verified checkpoint that `--resume` means by `auto` (newest, or none), `last`, `best`, or a path.

        Raises:
            CheckpointError: there is no such checkpoint, or the one at the path is not whole.
            ConfigError: a newer program wrote it.
        """
        if which not in ("auto", "last", "best"):
            return locate(Path(which), self.notice)
        if which == "best":
            found = best(self.folder, self.notice, self.metric)
        else:
            found = newest_valid(self.folder, self.notice)
        if found is None and which != "auto":
            evaluated = "evaluated " if which == "best" else ""
            raise CheckpointError(f"--resume {which}: there is no whole {evaluated}checkpoint in {self.folder}")
        return found

    def has(self, step: int) -> bool:
        """Whether this step is saved; its files are not read."""
        return any(checkpoint.meta.step == step for checkpoint in readable(self.folder, _ignore))

    def best_metric(self) -> float | None:
        """The best `metric` that was saved; None where none was measured."""
        saved = [checkpoint.meta.metrics for checkpoint in readable(self.folder, _ignore)]
        values = [metrics[self.metric] for metrics in saved if self.metric in metrics]
        return min(values, key=lambda value: cost(self.metric, value), default=None)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, so that a run that goes back to `step` does not meet them again."""
        for checkpoint in list(readable(self.folder, _ignore)):
            if checkpoint.meta.step > step:
                names = (f"former-{checkpoint.folder.name.lstrip('.')}-{number}" for number in itertools.count(1))
                aside = next(path for path in map(self.folder.joinpath, names) if not path.exists())
                checkpoint.folder.rename(aside)
                self.notice(f"going back behind step {checkpoint.meta.step}: its checkpoint is kept as {aside}")

    def save(
        self,
        parameters: Arrays,
        optimizer: Arrays,
        meta: CheckpointMeta,
        of_ranks: Sequence[Callable[[], Arrays | Arriving]] = (),
    ) -> Path:
        """Write a checkpoint, which is on disk when this returns, and then remove those that need not be kept.

        A whole checkpoint of the same step with the same arrays is left as it is, unless `meta` brings new metrics; any
        other one of the same step is replaced. Arrays are written from where they are: the call needs memory only for
        those that are not contiguous.

        Args:
            parameters: by name.
            optimizer: its state, as far as every rank has it.
            meta: what the checkpoint holds besides.
            of_ranks: what gets that which only one rank has, in rank order. Called one after the other, and what one
                gives is let go before the next is called.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: it could not be written, for example because the disk is full; older ones are as before.
        """
        aside = self._hidden(meta.step, "tmp")
        try:
            self._clean()
            try:
                files = dict(zip(FILES, (lambda: parameters, lambda: optimizer), strict=True))
                _write(aside, files | {rank_file(rank): get for rank, get in enumerate(of_ranks)}, meta)
                folder = self._put_in_place(aside)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            self._remove_old(meta.step)
        except OSError as error:
            num_bytes = sum(array.nbytes for array in [*parameters.values(), *optimizer.values()])
            raise CheckpointError(self._why_not_saved(meta.step, num_bytes, error)) from error
        return folder

    def _clean(self) -> None:
        """Tidy up what a killed run has left."""
        for old in self.folder.glob(".step-*.old"):
            folder = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if not folder.exists():
                old.rename(folder)
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def _put_in_place(self, aside: Path) -> Path:
        """Give the checkpoint its name, once what is on disk has been read back."""
        new = open_checkpoint(aside)
        folder, old = self.folder / _name(new.meta.step), self._hidden(new.meta.step, "old")
        if folder.exists():
            if _says_all_of(folder, new):
                return folder
            folder.rename(old)  # Folders cannot be swapped; until the next line has run, readers take the old one.
        aside.rename(folder)
        _sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    def _remove_old(self, saved_step: int) -> None:
        """Remove what need not be kept, the oldest first; never what cannot be read."""
        found = {checkpoint.meta.step: checkpoint for checkpoint in readable(self.folder, _ignore)}
        values = {step: checkpoint.meta.metrics.get(self.metric) for step, checkpoint in found.items()}
        costs = {step: None if value is None else cost(self.metric, value) for step, value in values.items()}
        keep = retained(costs, self.save_total_limit, self.keep_best) | {saved_step}
        for step in sorted(found.keys() - keep):
            aside = self._hidden(step, "tmp")  # Half removed under its own name, it would look torn.
            found[step].folder.rename(aside)
            shutil.rmtree(aside)

    def _why_not_saved(self, step: int, num_bytes: int, error: OSError) -> str:
        last = newest_valid(self.folder, _ignore)
        free = f", and {shutil.disk_usage(self.folder).free / 1e6:.1f} MB are free" if self.folder.is_dir() else ""
        return (
            f"the checkpoint of step {step} could not be saved in {self.folder}: {error.strerror or error}. It takes "
            f"{num_bytes / 1e6:.1f} MB{free}; make room or check the rights, then go on with --resume from the last "
            f"whole checkpoint ({last.folder.name if last else 'there is none yet'})"
        )

    def _hidden(self, step: int, suffix: str) -> Path:
        return self.folder / f".{_name(step)}.{suffix}"


class _HashingWriter(io.BufferedWriter):
    """A file that hashes what it is given, so that the manifest holds the hash of what was meant to be written."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        self.sha256.update(data)
        return super().write(data)


def _write(folder: Path, files: Mapping[str, Callable[[], Arrays | Arriving]], meta: CheckpointMeta) -> None:
    """Make the folder of a checkpoint, the manifest last, everything on disk."""
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        _sync_folder(folder.parent.parent)
    folder.mkdir()
    entries = {name: _write_arrays(folder / name, get()) for name, get in files.items()}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(Manifest(entries, meta).to_json())
        file.flush()
        _sync(file.fileno())
    _sync_folder(folder)


def _write_arrays(path: Path, arrays: Arrays | Arriving) -> FileEntry:
    given = arrays if isinstance(arrays, Arriving) else Arriving(arrays, arrays.values())
    with _HashingWriter(path) as file:
        write_tensors(file, given)
        file.flush()
        _sync(file.fileno())
        return FileEntry(file.tell(), file.sha256.hexdigest())


def _sync(descriptor: int) -> None:
    """Put what was written on disk; on macOS, `fsync` leaves it in the cache of the drive."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _says_all_of(folder: Path, new: Checkpoint) -> bool:
    """Whether the checkpoint in `folder` is whole and has the arrays and the metrics of `new`."""
    try:
        old = open_checkpoint(folder)
    except CheckpointError:
        return False
    return old.manifest.files == new.manifest.files and old.meta.metrics.items() >= new.meta.metrics.items()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _ignore(message: str) -> None:
    """For whom it is not news."""
