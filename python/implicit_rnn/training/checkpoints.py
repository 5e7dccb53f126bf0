"""Checkpoints: snapshots of a run as safetensors files, with a checksum that detects any damage."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from implicit_rnn import serialization
from implicit_rnn.errors import CheckpointError, warn
from implicit_rnn.files import as_path, read_tensors, remove_leftovers, write_atomically
from implicit_rnn.options import Option, check_count, check_positive
from implicit_rnn.training.snapshot import Snapshot

if TYPE_CHECKING:
    from implicit_rnn.training.loop import Training

Array = np.ndarray

FORMAT = "implicit-rnn checkpoint"
FORMAT_VERSION = 2
TEXTS = ("run", "epoch", "seconds", "random")


@dataclass(frozen=True)
class Checkpoint(Option):
    """Where and when to write checkpoints: at the start, at intervals of epochs or minutes, at the end, and at Ctrl-C
    or another exception.

    The file is replaced atomically: it always holds a complete checkpoint, the last.

    Parameters
    ----------
    path
        The file.
    every_epochs
        Epochs between two checkpoints; None disables this rule.
    every_minutes
        Minutes between two checkpoints; None disables this rule.

    Raises
    ------
    OSError
        During the run, if the file cannot be written.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.ckpt"
    >>> run = net.fit(X, X**2, epochs=10, checkpoint=irnn.Checkpoint(path, every_epochs=5), progress=False)
    >>> run = net.fit(X, X**2, epochs=20, resume=path, progress=False)  # the first 10 are there
    >>> len(run.loss)
    20
    """

    path: str | os.PathLike[str]
    every_epochs: int | None = None
    every_minutes: float | None = 5.0

    def __post_init__(self) -> None:
        as_path(self.path)
        if self.every_epochs is not None:
            check_count("every_epochs", self.every_epochs)
        if self.every_minutes is not None:
            check_positive("every_minutes", self.every_minutes)


def write(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot. Raises ``OSError``, with the file as it was before."""
    texts = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "run": json.dumps(snapshot.run),
        "epoch": str(snapshot.epoch),
        "seconds": repr(snapshot.seconds),
        "random": json.dumps(snapshot.random),
    }
    arrays = dict(snapshot.arrays)
    try:
        write_atomically(path, save(arrays, texts | {"checksum": _checksum(arrays, texts)}))
    except OSError as error:
        message = (
            f"the checkpoint of epoch {snapshot.epoch} could not be written to {path}: {error.strerror}. "
            "The file is as it was before, and the net keeps the parameters of this epoch"
        )
        raise OSError(error.errno, message) from error


def read(path: Path) -> Snapshot:
    """The snapshot that ``write`` wrote.

    Raises ``FileNotFoundError``, and ``CheckpointError`` for a file that is not a checkpoint or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}{', which is a folder' * path.is_dir()}")
    arrays, texts = read_tensors(path, CheckpointError)
    if texts.get("format") != FORMAT:
        is_model = texts.get("format") == serialization.FORMAT
        hint = ": it is a model that Network.save wrote; fit(X, Y, checkpoint=path) writes checkpoints" * is_model
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint{hint}")
    if texts.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {texts.get('format_version')}; this version of implicit-rnn reads {FORMAT_VERSION}"
        )
    if missing := [name for name in (*TEXTS, "checksum") if name not in texts]:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(missing)}")
    broken = [name for name in ("parameters", "good", "best") if name in arrays and not np.isfinite(arrays[name]).all()]
    remark = f"has parameters that are not finite ({', '.join(broken)})" if broken else ""
    if texts.pop("checksum") != _checksum(arrays, texts):
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match its contents{remark and f'; it {remark}'}"
        )
    if remark:
        warn(f"{path} {remark}; such a net has no equilibrium", UserWarning)
    run, random = json.loads(texts["run"]), json.loads(texts["random"])
    return Snapshot(run, int(texts["epoch"]), float(texts["seconds"]), random, arrays)


class Writer:
    """Writes checkpoints when they are due, the first at once."""

    def __init__(self, training: Training, checkpoint: Checkpoint) -> None:
        self.training, self.checkpoint, self.path = training, checkpoint, Path(checkpoint.path)
        self.failed = False
        remove_leftovers(self.path)
        self.latest = Snapshot.of(training)
        self._write()

    def __call__(self) -> None:
        """Take a snapshot at the end of an epoch, and write it if a checkpoint is due."""
        state, checkpoint = self.training.state, self.checkpoint
        self.latest = Snapshot.of(self.training)
        minutes = (time.perf_counter() - self.when) / 60
        ended = state.epoch >= self.training.settings.epochs or not state.running.any()
        by_epoch = checkpoint.every_epochs is not None and state.epoch % checkpoint.every_epochs == 0
        if ended or by_epoch or (checkpoint.every_minutes is not None and minutes >= checkpoint.every_minutes):
            self._write()

    def save(self) -> None:
        """Write the latest snapshot, whatever has happened in training since, unless the file has it already."""
        if self.latest is not self.written:
            self._write()

    def _write(self) -> None:
        try:
            write(self.path, self.latest)
        except OSError:
            self.failed = True  # this failure is to be reported, not a second one
            raise
        self.written, self.when = self.latest, time.perf_counter()


def _checksum(arrays: Mapping[str, Array], texts: Mapping[str, str]) -> str:
    """A digest of the whole contents of a file."""
    digest = hashlib.blake2b(digest_size=16)
    layout = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    digest.update(json.dumps([layout, dict(texts)], sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
