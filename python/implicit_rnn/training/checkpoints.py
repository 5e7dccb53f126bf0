"""Checkpoints: a run at the end of an epoch as a safetensors file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from implicit_rnn.engines import Halt, Samples
from implicit_rnn.errors import CheckpointError
from implicit_rnn.files import read_tensors, write_atomically
from implicit_rnn.options import Option, check_count, check_positive

if TYPE_CHECKING:
    from implicit_rnn.training.loop import Training

Array = np.ndarray

FORMAT = "implicit-rnn checkpoint"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint(Option):
    """Where and when to write checkpoints: at the start, every so many epochs or minutes, and at the end.

    The file is replaced as a whole: it always holds a complete checkpoint, the last.

    Parameters
    ----------
    path
        The file.
    every_epochs
        Epochs between two checkpoints; None for no such rule.
    every_minutes
        Minutes between two checkpoints; None for no such rule.

    Raises
    ------
    ValueError, TypeError
        For options out of range or of the wrong kind; ``TypeError`` for one that does not exist.
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

    path: str | Path
    every_epochs: int | None = None
    every_minutes: float | None = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path):
            raise TypeError(f"path must be a path, got {self.path!r}")
        if self.every_epochs is not None:
            check_count("every_epochs", self.every_epochs)
        if self.every_minutes is not None:
            check_positive("every_minutes", self.every_minutes)


def write(path: Path, training: Training) -> None:
    """Write the state of a run. Raises ``OSError``, with the file as it was before."""
    state = training.state
    tensors = {
        "parameters": state.nets.parameters,
        "good": state.nets.good,
        "halted": state.nets.halted,
        "ended": state.ended,
        "optimizer": training.trainer.state(),
        "losses": state.losses[:, : state.epoch],
        "unconverged": state.unconverged[:, : state.epoch],
        "best": state.best,
        "best_loss": state.best_loss,
        "best_epoch": state.best_epoch,
        "improved_loss": state.improved_loss,
        "improved_epoch": state.improved_epoch,
        "validation_epochs": np.array(state.validation_epochs, np.int64),
        "validation_losses": np.array(state.validation_losses, np.float64),
        "validation_unconverged": np.array(state.validation_unconverged, np.int64),
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "run": json.dumps(_description(training)),
        "epoch": str(state.epoch),
        "seconds": repr(state.seconds),
        "random": json.dumps(state.rng.bit_generator.state),
    }
    try:
        write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata))
    except OSError as error:
        message = (
            f"the checkpoint of epoch {state.epoch} could not be written to {path}: {os.strerror(error.errno or 0)}. "
            "The file is as it was before, and the net keeps the parameters of this epoch"
        )
        raise OSError(error.errno, message) from error


def restore(path: Path, training: Training) -> None:
    """Put a run into the state that ``write`` wrote, in which nets go on that a callback has ended just then.

    Raises ``FileNotFoundError``, and ``CheckpointError`` for a file that is no checkpoint, or one of a run that differs
    in its data, its nets or its settings.
    """
    tensors, metadata = _read(path)
    _compare(path, json.loads(metadata["run"]), training, int(metadata["epoch"]))
    state = training.state
    state.epoch = int(metadata["epoch"])
    state.seconds = float(metadata["seconds"])
    state.rng.bit_generator.state = json.loads(metadata["random"])
    state.losses[:, : state.epoch] = tensors["losses"]
    state.unconverged[:, : state.epoch] = tensors["unconverged"]
    state.nets.parameters[...] = tensors["parameters"]
    state.nets.good[...] = tensors["good"]
    state.nets.halted[...] = tensors["halted"]
    for name in ("ended", "best", "best_loss", "best_epoch", "improved_loss", "improved_epoch"):
        getattr(state, name)[...] = tensors[name]
    state.validation_epochs = tensors["validation_epochs"].tolist()
    state.validation_losses = list(tensors["validation_losses"])
    state.validation_unconverged = list(tensors["validation_unconverged"])
    paused = (state.nets.halted == Halt.BY_CALLBACK) & (state.ended == state.epoch)
    state.nets.halted[paused], state.ended[paused] = Halt.RUNNING, 0
    training.trainer.restore(tensors["optimizer"])
    training.publish()


def _read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    tensors, metadata = read_tensors(path, CheckpointError)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {metadata.get('format_version')}; this version of implicit-rnn reads "
            f"{FORMAT_VERSION}"
        )
    return tensors, metadata


def _compare(path: Path, then: dict[str, Any], training: Training, epoch: int) -> None:
    """``CheckpointError`` that names what differs, unless the run of the checkpoint is the one to be resumed."""
    now = _description(training)
    settings = training.settings
    differ = [
        f"{name} is {then.get(name)} there and {value} here"
        for name, value in now.items()
        if name != "epochs" and value != then.get(name)
    ]
    if then["epochs"] != now["epochs"] and settings.schedule.needs_end:
        differ.append(
            f"epochs is {then['epochs']} there and {now['epochs']} here, and the learning rates of {settings.schedule} "
            "depend on it (those of Constant, Step, and WarmUp to one of these do not)"
        )
    if differ:
        raise CheckpointError(f"{path} is the checkpoint of another run: {'; '.join(differ)}")
    if epoch > settings.epochs:
        raise CheckpointError(f"{path} is at epoch {epoch} already, beyond epochs={settings.epochs}")


def _description(training: Training) -> dict[str, Any]:
    """What must be equal for a run to go on bit by bit, as JSON knows it."""
    first = training.nets[0]
    run = {
        "engine": first.engine.name,
        "topology": first.topology.description(),
        "dtype": first.dtype.name,
        "nets": len(training.nets),
        **_describe_samples("training data", training.samples),
        **_describe_samples("validation data", training.held_out),
        **training.settings.description(),
    }
    described: dict[str, Any] = json.loads(json.dumps(run))
    return described


def _describe_samples(name: str, samples: Samples | None) -> dict[str, Any]:
    if samples is None:
        return {f"shape of the {name}": None, f"fingerprint of the {name}": None}
    arrays = [array for array in (samples.X, samples.Y, samples.weights) if array is not None]
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return {
        f"shape of the {name}": [list(array.shape) for array in arrays],
        f"fingerprint of the {name}": digest.hexdigest(),
    }
