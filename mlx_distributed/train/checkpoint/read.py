"""Finding, checking and loading checkpoints. Nothing here changes the folder, which a run may be writing to."""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import mlx.core as mx

from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.errors import CheckpointError
from mlx_distributed.parallel.adamw import MOMENTS
from mlx_distributed.train.best import EVAL_LOSS, cost
from mlx_distributed.train.checkpoint.manifest import FILES, CheckpointMeta, Manifest
from mlx_distributed.train.checkpoint.segments import (
    COPY,
    FEEDBACK,
    PENDING,
    SEGMENT,
    STAGE_OPTIMIZER,
    STAGE_PARAMETERS,
    merge,
)

MANIFEST = "manifest.json"

_MAX_MANIFEST_BYTES = 1 << 24
_FOLDER = re.compile(r"step-([0-9]{8,19})|\.step-([0-9]{8,19})\.old")

Notice = Callable[[str], None]
"""Is told, in words, of each checkpoint that is passed over."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest is sound and whose files have the right sizes."""

    folder: Path
    manifest: Manifest

    @property
    def meta(self) -> CheckpointMeta:
        """What it holds besides arrays."""
        return self.manifest.meta

    def verify(self) -> None:
        """Compare the files with the hashes of the manifest.

        Raises:
            CheckpointError: a file has other contents, or cannot be read.
        """
        for name, entry in self.manifest.files.items():
            try:
                with (self.folder / name).open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error.strerror}") from error
            if sha256 != entry.sha256:
                raise CheckpointError(f"{self.folder} is corrupted: {name} does not have the SHA-256 of {MANIFEST}")

    def load(self) -> tuple[Arrays, Arrays]:
        """Parameters and optimizer state, evaluated: MLX reads lazily, and the files may be gone later.

        Raises:
            CheckpointError: MLX cannot read the files, or what is in them does not fit together.
        """
        return self.parameters(), dict(self.optimizer())

    def parameters(self) -> Arrays:
        """The parameters, evaluated; see `load` for errors."""
        return dict(self.each_parameter())

    def each_parameter(self) -> Iterator[tuple[str, mx.array]]:
        """The parameters in the order of their names, one at a time and evaluated; see `load` for errors."""
        arrays = self.lazy_parameters()
        for name in sorted(arrays):
            yield name, self._read({name: arrays.pop(name)})[name]

    def lazy_parameters(self) -> Arrays:
        """The parameters, which are read when they are evaluated: the files have to be there until then."""
        return self._with_stages(FILES[0], STAGE_PARAMETERS)

    def optimizer(self) -> Iterator[tuple[str, mx.array]]:
        """The arrays of the optimizer's state in the order of their names, one at a time, whole and evaluated, whether
        they were saved whole or as segments; see `load` for errors."""
        arrays = self._with_stages(FILES[1], STAGE_OPTIMIZER)
        segments = self._of_ranks(SEGMENT)
        if any(segments):
            shapes = {name: tuple(array.shape) for name, array in self._open(FILES[0]).items()}
            shapes = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in MOMENTS}
            try:
                moments = merge(chain.from_iterable(found.items() for found in segments), shapes)
            except ValueError as error:
                raise CheckpointError(f"{self.folder} is corrupted: {error}") from None
            if twice := sorted(arrays.keys() & moments.keys()):
                raise CheckpointError(f"{self.folder} is corrupted: {twice[0]} is there both whole and in segments")
            arrays |= moments
            del moments
        del segments
        for name in sorted(arrays):
            yield name, self._read({name: arrays.pop(name)})[name]

    def feedback(self) -> list[Callable[[], Arrays]]:
        """What loads, for each rank of the group that saved, what compression had left out, by the name of the
        parameter; empty where it left out nothing. See `load` for errors."""
        return [lambda load=load: _without(FEEDBACK, load()) for load in self.of_ranks(FEEDBACK)]  # type: ignore[misc]

    def of_ranks(self, prefix: str) -> list[Callable[[], Arrays]]:
        """What loads, for each rank whose file has any, the arrays whose names begin so; see `load` for errors."""
        found = self._of_ranks(prefix)
        return [partial(self._load_of_rank, rank, prefix) for rank, arrays in enumerate(found) if arrays]

    def _with_stages(self, name: str, prefix: str) -> Arrays:
        """What is in a file that all share, and what the stages of a pipeline have beside it; not yet evaluated."""
        arrays = self._open(name)
        for stage in self._of_ranks(prefix):
            arrays |= _without(prefix, stage)
        return arrays

    def _load_of_rank(self, rank: int, prefix: str) -> Arrays:
        return self._read(self._of_ranks(prefix)[rank])

    def _of_ranks(self, prefix: str) -> list[Arrays]:
        """What the file of each rank has whose name begins so, not yet evaluated."""
        files = [self._open(name) for name in self.manifest.of_ranks]
        for name in chain.from_iterable(files):
            if not name.startswith((FEEDBACK, SEGMENT, COPY, PENDING, STAGE_PARAMETERS, STAGE_OPTIMIZER)):
                raise CheckpointError(f"{self.folder} is corrupted: no rank can have {name!r}")
        return [{name: array for name, array in arrays.items() if name.startswith(prefix)} for arrays in files]

    def _read(self, arrays: Arrays) -> Arrays:
        """The same arrays, evaluated."""
        try:
            mx.eval(arrays)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error
        return arrays

    def _open(self, name: str) -> Arrays:
        """The arrays in one file, not yet evaluated."""
        path = self.folder / name
        try:
            arrays = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file that MLX can read: {error}") from error
        assert isinstance(arrays, dict)
        for array_name, array in arrays.items():
            if array.size != math.prod(array.shape):  # MLX lets the product overflow.
                raise CheckpointError(f"{path} is corrupted: {array_name!r} cannot have the shape {array.shape}")
        return arrays


def _without(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, verified.

    Raises:
        CheckpointError: it is not a checkpoint, or a torn or corrupted one.
        ConfigError: a newer program wrote it.
    """
    checkpoint = _read(folder)
    checkpoint.verify()
    return checkpoint


def newest_valid(folder: Path, notice: Notice) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; None where there is none.

    Raises:
        ConfigError: a newer program wrote one that would have to be passed over, and its steps would be lost.
    """
    return next(_verified(readable(folder, notice), notice), None)


def best(folder: Path, notice: Notice, metric: str = EVAL_LOSS) -> Checkpoint | None:
    """The whole checkpoint in `folder` that is the best by `metric`, the first of equals; None where none has it.

    Raises:
        ConfigError: a newer program wrote one of them.
    """
    evaluated = [checkpoint for checkpoint in readable(folder, notice) if metric in checkpoint.meta.metrics]
    evaluated.sort(key=lambda checkpoint: (cost(metric, checkpoint.meta.metrics[metric]), checkpoint.meta.step))
    return next(_verified(evaluated, notice), None)


def locate(path: Path, notice: Notice) -> Checkpoint:
    """The checkpoint that a person means by `path`: it itself, or the newest whole one of an output_dir.

    Raises:
        CheckpointError: there is none, or it is not whole.
        ConfigError: a newer program wrote it.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not _folders(folder):
        return open_checkpoint(path)
    newest = newest_valid(folder, notice)
    if newest is None:
        raise CheckpointError(f"no checkpoint in {folder} is whole")
    return newest


def readable(folder: Path, notice: Notice) -> Iterator[Checkpoint]:
    """The checkpoints in `folder` with a sound manifest and files of the right sizes, newest first.

    Raises:
        ConfigError: a newer program wrote the next one.
    """
    for path in _folders(folder).values():
        try:
            yield _read(path)
        except CheckpointError as error:
            notice(f"passed over: {error}")


def _verified(checkpoints: Iterable[Checkpoint], notice: Notice) -> Iterator[Checkpoint]:
    for checkpoint in checkpoints:
        try:
            checkpoint.verify()
        except CheckpointError as error:
            notice(f"passed over: {error}")
        else:
            yield checkpoint


def _folders(folder: Path) -> dict[int, Path]:
    """What is named like a checkpoint, by step, newest first."""
    found = {}
    for path in sorted(folder.glob("*step-*")):  # "." sorts before "s": a former checkpoint counts where it is alone.
        if match := _FOLDER.fullmatch(path.name):
            found[int(match[1] or match[2])] = path
    return dict(sorted(found.items(), reverse=True))


def _read(folder: Path) -> Checkpoint:
    if _file_size(folder / MANIFEST) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{folder} is not a checkpoint: {MANIFEST} has more than {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = Manifest.parse((folder / MANIFEST).read_bytes(), folder)
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {MANIFEST} {error}") from error
    match = _FOLDER.fullmatch(folder.name)
    if match and int(match[1] or match[2]) != manifest.meta.step:
        raise CheckpointError(f"{folder} is misnamed: {MANIFEST} says step {manifest.meta.step}")
    for name, entry in manifest.files.items():
        num_bytes = _file_size(folder / name)
        if num_bytes != entry.num_bytes:
            raise CheckpointError(f"{folder} is corrupted: {name} has {num_bytes} bytes instead of {entry.num_bytes}")
    return Checkpoint(folder, manifest)


def _file_size(path: Path) -> int:
    """In bytes. A link could lead out of the folder, and a pipe would block the reader: both are refused."""
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path.parent} is not a whole checkpoint: {path.name}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.parent} is not a checkpoint: {path.name} is not a regular file")
    return status.st_size
