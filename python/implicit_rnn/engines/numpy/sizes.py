"""Norms of iterates and steps of equations, independent of units, and the criteria for steps."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from implicit_rnn.engines.base import Equation
from implicit_rnn.norms import scaled_norm

Array = np.ndarray

SLOW = 0.4
"""The quotient of two steps above which zero is tried, if they are below the round-off of the largest iterate."""
SMALLEST_ROOT_STEP = 2.0**-20
"""The smallest fraction of a Newton step to a root that is tried."""

BACKSTEP, RESPONSE = 2.0**-10, 32.0
"""The fraction of the last step that is taken back to see whether f responds, and the factor within which it must."""


def far_step(tol: float) -> float:
    """The largest last-but-one step of Newton's method near a root, relative to the largest iterate."""
    return max(1e-3, 10 * sqrt(tol))


def is_near(step: Any, size: Any, tol: float, rounding: Any, flat: Any) -> Any:
    """Whether steps, numbers or arrays, end the iteration; ``flat`` where they may have stopped shrinking, see ``Equation``."""
    return (step <= tol * size) | ((step <= rounding) & (flat | (step == 0)))


def lingers(step: Any, rounding: Any, eps: float, rate: Any, spent: Any) -> Any:
    """Whether steps, numbers or arrays, are so small that they may be approaching zero."""
    return (step <= rounding) & ((rate > SLOW) | spent | (step <= eps * rounding))


class Sizes:
    """Sizes of z without a unit: in that of ``scale`` where there is one, in double precision."""

    def __init__(self, equation: Equation, tol: float) -> None:
        self.weights = 1.0 if equation.scale is None else 1 / equation.scale.astype(np.float64)
        self.floor = 0.0 if equation.scale is None else float(np.sqrt(equation.n))
        self.root, self.tol, self.eps = equation.root, tol, float(np.finfo(equation.start.dtype).eps)
        self.largest = np.zeros(equation.samples)

    def __call__(self, V: Array) -> Array:
        return scaled_norm(V.astype(np.float64) * self.weights)

    def begin(self, index: Array) -> None:
        """Begin the samples ``index``, forgetting earlier iterates."""
        self.largest[index] = 0

    def record(self, size: Array, index: Array) -> None:
        """Record iterates of that size for the samples ``index``; trial steps that are taken back do not count."""
        self.largest[index] = np.fmax(self.largest[index], size)

    def reference(self, size: Array, index: Array) -> Array:
        """The size to which a step is relative, at iterates of that size of the samples ``index``."""
        return np.maximum(np.maximum(size, self.floor), self.rounding(size, index) / self.tol)

    def rounding(self, size: Array, index: Array) -> Array:
        """The round-off of the largest iterate so far."""
        return np.asarray(self.eps * np.fmax(self.largest[index], size))

    def near(self, step: Array, size: Array, index: Array, rate: Array) -> Array:
        """Whether steps at iterates of that size end the iteration."""
        flat = False if self.root else rate >= 1
        return np.asarray(is_near(step, np.maximum(size, self.floor), self.tol, self.rounding(size, index), flat))

    def lingers(self, step: Array, size: Array, index: Array, rate: Array, spent: Array) -> Array:
        """Whether small steps may be approaching zero."""
        return np.asarray(lingers(step, self.rounding(size, index), self.eps, rate, spent))
