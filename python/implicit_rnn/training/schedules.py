"""Learning-rate schedules: the factor on the optimiser's learning rate, step by step over the whole run."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from implicit_rnn.options import Option, check_count, check_fraction, check_share, choose

Array = np.ndarray


@dataclass(frozen=True)
class Schedule(Option):
    """How the learning rate changes in the course of a run.

    The rate of a step is the optimiser's ``learning_rate`` times a factor that depends on the index t of the step
    (from 0), the steps per epoch, and with some schedules on the number T of steps of the whole run.

    Examples
    --------
    >>> irnn.WarmUp(epochs=2).factors(np.arange(4), steps_per_epoch=1, total=4)
    array([0.5, 1. , 1. , 1. ])
    >>> irnn.Cosine().needs_end, irnn.Step().needs_end
    (True, False)
    """

    @property
    def needs_end(self) -> bool:
        """Whether the factors depend on T, so that the run cannot be extended."""
        return True

    @abstractmethod
    def factors(self, t: Array, steps_per_epoch: int, total: int) -> Array:
        """The factors on the learning rate.

        Parameters
        ----------
        t
            Indices of steps (n,), from 0.
        steps_per_epoch, total
            The number of steps of an epoch and of the whole run.

        Returns
        -------
        The factors (n,).
        """


@dataclass(frozen=True)
class Constant(Schedule):
    """The learning rate of the optimiser throughout.

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> settings = {"optimizer": irnn.SGD(1.0), "epochs": 3, "progress": False}
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], schedule=irnn.Constant(), **settings)
    >>> print(run.learning_rate.round(3))
    [1. 1. 1.]
    """

    needs_end = False

    def factors(self, t: Array, steps_per_epoch: int, total: int) -> Array:
        """1."""
        return np.ones(len(t))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Falls from 1 along half a cosine: ``final + (1 - final) (1 + cos(π t / T)) / 2``.

    Loshchilov and Hutter, arXiv 1608.03983, without restarts.

    Parameters
    ----------
    final
        The factor towards which it falls, from 0 to 1.

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> settings = {"optimizer": irnn.SGD(1.0), "epochs": 4, "progress": False}
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], schedule=irnn.Cosine(), **settings)
    >>> print(run.learning_rate.round(3))
    [1.    0.854 0.5   0.146]
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        check_share("final", self.final)

    def factors(self, t: Array, steps_per_epoch: int, total: int) -> Array:
        """The formula above."""
        return _cosine(1.0, self.final, t / total)


@dataclass(frozen=True)
class Step(Schedule):
    """``factor`` to the power ⌊epoch / every⌋, epochs counted from 0.

    Parameters
    ----------
    every
        Epochs between two steps.
    factor
        The factor of each step, in (0, 1).

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> settings = {"optimizer": irnn.SGD(1.0), "epochs": 5, "progress": False}
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], schedule=irnn.Step(every=2, factor=0.1), **settings)
    >>> print(run.learning_rate.round(3))
    [1.   1.   0.1  0.1  0.01]
    """

    every: int = 30
    factor: float = 0.1

    needs_end = False

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_fraction("factor", self.factor)

    def factors(self, t: Array, steps_per_epoch: int, total: int) -> Array:
        """The formula above."""
        return np.asarray(self.factor ** (t // (steps_per_epoch * self.every)).astype(np.float64))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Rises from ``start`` to 1 in the first ``rise`` of the run and falls to ``final``, both along half a cosine.

    The optimiser's learning rate is reached at the peak. Smith and Topin, arXiv 1708.07120.

    Parameters
    ----------
    rise
        The share of the run in which it rises, in (0, 1).
    start
        The factor at the start, from 0 to 1.
    final
        The factor at the end, from 0 to 1.

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> settings = {"optimizer": irnn.SGD(1.0), "epochs": 4, "progress": False}
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], schedule=irnn.OneCycle(rise=0.5), **settings)
    >>> print(run.learning_rate.round(3))
    [0.04 0.52 1.   0.5 ]
    """

    rise: float = 0.3
    start: float = 0.04
    final: float = 4e-6

    def __post_init__(self) -> None:
        check_fraction("rise", self.rise)
        check_share("start", self.start)
        check_share("final", self.final)

    def factors(self, t: Array, steps_per_epoch: int, total: int) -> Array:
        """The formula above."""
        s = t / total
        rising = _cosine(self.start, 1.0, s / self.rise)
        falling = _cosine(1.0, self.final, (s - self.rise) / (1 - self.rise))
        return np.where(s < self.rise, rising, falling)


@dataclass(frozen=True)
class WarmUp(Schedule):
    """Rises in equal steps to 1 over ``epochs`` epochs; ``then`` schedules the rest of the run as a run of its own.

    Parameters
    ----------
    epochs
        Epochs of the rise.
    then
        The schedule after it, or the name of one.

    Examples
    --------
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> settings = {"optimizer": irnn.SGD(1.0), "epochs": 6, "progress": False}
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], schedule=irnn.WarmUp(2, then=irnn.Cosine()), **settings)
    >>> print(run.learning_rate.round(3))
    [0.5   1.    1.    0.854 0.5   0.146]
    """

    epochs: int = 5
    then: ScheduleLike = Constant()

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        object.__setattr__(self, "then", choose(Schedule, self.then, "then"))

    @property
    def needs_end(self) -> bool:
        """Whether ``then`` needs it."""
        return cast("Schedule", self.then).needs_end

    def factors(self, t: Array, steps_per_epoch: int, total: int) -> Array:
        """``(t + 1) / (steps of the warm-up)`` at first."""
        steps = self.epochs * steps_per_epoch
        rest = cast("Schedule", self.then).factors(np.maximum(t - steps, 0), steps_per_epoch, max(total - steps, 1))
        return np.where(t < steps, (t + 1) / steps, rest)


def _cosine(begin: float, end: float, s: Array) -> Array:
    """From ``begin`` at s = 0 to ``end`` at s = 1."""
    return np.asarray(end + (begin - end) * (1 + np.cos(np.pi * s)) / 2)


ScheduleLike = Schedule | Literal["constant", "cosine", "step", "one_cycle", "warm_up"]
"""A schedule, or the name of one with its default options."""
