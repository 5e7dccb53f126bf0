"""The data sets of a seed, and their scaling for networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from implicit_rnn.experiments.pendulum.simulation import Pendulums, measure

Array = np.ndarray

HELD_OUT_SEED = 999
"""The seed of the validation and test sets, which all seeds share."""


@dataclass(frozen=True)
class Sizes:
    """The number of pendulums in each data set."""

    train: int = 1000
    validation: int = 500
    test: int = 2000


@dataclass(frozen=True)
class Normalisation:
    """Inputs lose their mean at each time and are divided by one number; targets get mean 0 and standard deviation 1.

    A single divisor preserves the shape of a trajectory. All statistics are from the training set, none from held-out data.
    """

    input_mean: Array
    input_scale: float
    target_mean: Array
    target_scale: Array

    @classmethod
    def of(cls, train: Pendulums) -> Normalisation:
        mean = train.measured.mean(axis=0)
        return cls(
            mean, float((train.measured - mean).std()), train.parameters.mean(axis=0), train.parameters.std(axis=0)
        )

    def inputs(self, measured: Array) -> Array:
        """Measured angles (B, 32) as inputs of a network."""
        return (measured - self.input_mean) / self.input_scale

    def targets(self, parameters: Array) -> Array:
        """Lengths and dampings (B, 2) as targets of a network."""
        return (parameters - self.target_mean) / self.target_scale

    def parameters(self, outputs: Array) -> Array:
        """The inverse of ``targets``."""
        return outputs * self.target_scale + self.target_mean

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Normalisation:
        """The inverse of ``as_dict``; ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        mean, target_mean, target_scale = (
            np.asarray(data[name], np.float64) for name in ("input_mean", "target_mean", "target_scale")
        )
        return cls(mean, float(data["input_scale"]), target_mean, target_scale)


@dataclass(frozen=True)
class Data:
    """The training, validation and test data of one seed."""

    train: Pendulums
    validation: Pendulums
    test: Pendulums

    @classmethod
    def of_seed(cls, seed: int, sizes: Sizes = Sizes()) -> Data:
        """The training set belongs to the seed; the test set is drawn before the validation set, from a seed of theirs."""
        held_out = np.random.default_rng(HELD_OUT_SEED)
        test = measure(sizes.test, held_out)
        validation = measure(sizes.validation, held_out)
        return cls(measure(sizes.train, np.random.default_rng(seed)), validation, test)
