"""The state of a run at the end of an epoch, from which the run can continue later as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from implicit_rnn.engines.base import Halt, Samples
from implicit_rnn.errors import CheckpointError
from implicit_rnn.fingerprints import fingerprint, plain

if TYPE_CHECKING:
    from implicit_rnn.training.loop import Training

Array = np.ndarray

PER_NET = ("origin", "ended", "best", "best_loss", "best_epoch", "improved_loss", "improved_epoch")
"""The arrays that are copied from the state of a run unchanged."""
COMMON = "validation_epochs"
"""The one array that has no leading axis of nets."""


@dataclass(frozen=True)
class Snapshot:
    """The whole state of S nets in training at the end of an epoch."""

    run: Mapping[str, Any]
    """The description that must be equal for a run to continue from here bit by bit, see ``describe``."""
    epoch: int
    seconds: float
    random: Mapping[str, Any]
    """The state of the generator of the minibatches' order."""
    arrays: Mapping[str, Array]
    """The rest by name, with a leading axis of nets."""

    @classmethod
    def of(cls, training: Training) -> Snapshot:
        """The state of a run, copied."""
        return cls._shared(training)._copied(slice(None))

    @classmethod
    def of_each(cls, training: Training) -> list[Snapshot]:
        """The part of each net, copied."""
        whole = cls._shared(training)
        return [whole._copied(slice(k, k + 1)) for k in range(len(training.nets))]

    @classmethod
    def _shared(cls, training: Training) -> Snapshot:
        """The state of a run, whose arrays change when it goes on."""
        state = training.state
        table = (len(state.validation_epochs), len(training.nets))
        arrays = {
            "parameters": state.nets.parameters,
            "good": state.nets.good,
            "halted": state.nets.halted,
            "optimizer": training.trainer.state(),
            "losses": state.losses[:, : state.epoch],
            "unconverged": state.unconverged[:, : state.epoch],
            **{name: getattr(state, name) for name in PER_NET},
            COMMON: np.array(state.validation_epochs, np.int64),
            "validation_losses": np.array(state.validation_losses, np.float64).reshape(table).T,
            "validation_unconverged": np.array(state.validation_unconverged, np.int64).reshape(table).T,
        }
        return cls(training.description, state.epoch, state.seconds, state.rng.bit_generator.state, arrays)

    def _copied(self, nets: slice) -> Snapshot:
        arrays = {name: (a if name == COMMON else a[nets]).copy(order="C") for name, a in self.arrays.items()}
        return Snapshot(self.run, self.epoch, self.seconds, self.random, arrays)

    @classmethod
    def join(cls, parts: Sequence[Snapshot]) -> Snapshot:
        """The whole from the parts of its nets; ``CheckpointError`` for parts of several runs, or an incomplete list."""
        first = parts[0]
        if len(parts) != first.run["nets"]:
            raise CheckpointError(
                f"resume has {len(parts)} runs of a call that has returned {first.run['nets']}; expected all"
            )
        if any((part.run, part.epoch, part.random) != (first.run, first.epoch, first.random) for part in parts):
            raise CheckpointError(
                "resume has runs of several calls; expected the list that one call of fit_many returned"
            )
        stacked = {
            name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays if name != COMMON
        }
        return replace(first, arrays=stacked | {COMMON: first.arrays[COMMON]})

    @property
    def going_on(self) -> Array:
        """(S,) which nets can continue: those in training; if there are none, those that a callback ended last."""
        halted, ended = self.arrays["halted"], self.arrays["ended"]
        running = halted == Halt.RUNNING
        return np.asarray(running if running.any() else (halted == Halt.BY_CALLBACK) & (ended == self.epoch))

    def restore(self, training: Training, origin: str, last: int) -> None:
        """Put a run into this state; nets that a callback ended continue if that ended the whole run.

        Raises ``CheckpointError``, whose message calls this snapshot ``origin``, for a run that differs in its data, nets or
        settings, for nets in another order, and for a state after the epoch ``last``.
        """
        self._check(training, origin, last)
        self._check_order(training, origin)
        state, arrays = training.state, self.arrays
        state.epoch, state.seconds = self.epoch, self.seconds
        state.rng.bit_generator.state = self.random
        state.losses[:, : self.epoch] = arrays["losses"]
        state.unconverged[:, : self.epoch] = arrays["unconverged"]
        state.nets.parameters[...] = arrays["parameters"]
        state.nets.good[...] = arrays["good"]
        state.nets.halted[...] = arrays["halted"]
        for name in PER_NET:
            getattr(state, name)[...] = arrays[name]
        state.validation_epochs = arrays[COMMON].tolist()
        state.validation_losses = list(arrays["validation_losses"].T)
        state.validation_unconverged = list(arrays["validation_unconverged"].T)
        state.nets.halted[self.going_on], state.ended[self.going_on] = Halt.RUNNING, 0
        training.trainer.restore(arrays["optimizer"])
        training.publish()

    def _check(self, training: Training, origin: str, last: int) -> None:
        here, settings = training.description, training.settings
        differ = list(_differences(self.run, here))
        if self.run["epochs"] != here["epochs"] and settings.schedule.needs_end:
            differ.append(
                f"epochs is {self.run['epochs']} there and {here['epochs']} here, and the learning rates of "
                f"{settings.schedule} depend on it (those of Constant, Step, and WarmUp to one of these do not)"
            )
        if differ:
            raise CheckpointError(f"{origin} is of another run: {'; '.join(differ)}")
        if self.epoch > last:
            raise CheckpointError(
                f"{origin} is at epoch {self.epoch} already, and epochs={settings.epochs} counts from the start of its run"
            )

    def _check_order(self, training: Training, origin: str) -> None:
        """``CheckpointError`` if a net has the parameters with which another net, at a different position, began or ended."""
        places: dict[bytes, set[int]] = {}
        for k in range(len(training.nets)):
            for each in (
                digest(self.arrays["parameters"][k]),
                digest(self.arrays["best"][k]),
                self.arrays["origin"][k],
            ):
                places.setdefault(each.tobytes(), set()).add(k)
        found = [places.get(digest(net.parameters).tobytes(), set()) for net in training.nets]
        for k, others in enumerate(found):
            if others and k not in others and not any(j in found[j] for j in others):
                raise CheckpointError(
                    f"nets[{k}] has the parameters of net {min(others)} of {origin}, both counted from 0; expected nets and runs "
                    "in the same order"
                )


def digest(parameters: Array) -> Array:
    """(16,) bytes that identify the parameters of a net."""
    made = hashlib.blake2b(np.ascontiguousarray(parameters).data, digest_size=16).digest()
    return np.frombuffer(made, np.uint8)


# --- what must be equal --------------------------------------------------------------------------------------


def describe(training: Training) -> dict[str, Any]:
    """Engine, nets, settings and data of a run as JSON data; equal only if one run may continue the other."""
    first, held_out = training.nets[0], training.held_out
    run = {
        "engine": first.engine.name,
        "device": first.device,
        "dtype": first.dtype.name,
        "nets": len(training.nets),
        **first.topology.description(),
        "constraint": plain(first.topology.constraint),
        **{field.name: plain(getattr(training.settings, field.name)) for field in fields(training.settings)},
        "data": {
            **_fingerprints(training.samples, ("X", "Y", "sample_weights")),
            **_fingerprints(held_out, ("validation[0]", "validation[1]", "validation[2]")),
        },
    }
    described: dict[str, Any] = json.loads(json.dumps(run))
    return described


def _fingerprints(samples: Samples | None, names: Sequence[str]) -> dict[str, Any]:
    arrays = (None, None, None) if samples is None else (samples.X, samples.Y, samples.weights)
    return {name: fingerprint(array) for name, array in zip(names, arrays, strict=True)}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """The differences between two descriptions, field by field, except the epochs."""
    for name in {**here, **there}:  # a later version may have settings that are unknown here
        if name == "data":
            for array in here[name]:
                yield from _data_difference(array, there[name][array], here[name][array])
        elif name not in ("epochs", "samples"):  # the shape of X shows the samples
            yield from _field_differences(name, there.get(name), here.get(name))


def _field_differences(name: str, there: Any, here: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict) and there.get("name") == here.get("name"):
        for key in {**here, **there}:
            yield from _field_differences(f"{name}.{key}", there.get(key), here.get(key))
    elif name == "layers" and len(there) == len(here):
        for k, layers in enumerate(zip(there, here, strict=True)):
            yield from _field_differences(f"{name}[{k}]", *layers)
    elif there != here:
        yield f"{name} is {_word(there)} there and {_word(here)} here"


def _data_difference(name: str, there: Any, here: Any) -> Iterator[str]:
    shapes = [None if array is None else tuple(array["shape"]) for array in (there, here)]
    if shapes[0] != shapes[1]:
        yield (
            f"{name} has the shape {shapes[0]} there and {shapes[1]} here"
            if all(shapes)
            else (f"{name} is given {'there' if there else 'here'} only")
        )
    elif there != here:
        yield f"{name} has other values"


def _word(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else reprlib.repr(value)
