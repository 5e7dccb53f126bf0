"""Picard steps of a stage instead of its equilibrium, and their derivatives (backpropagation through time)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from implicit_rnn.engines.numpy.solvers import StageEquation, transposed
from implicit_rnn.engines.numpy.weights import StageWeights

Array = np.ndarray
Chain = list[tuple[Array, Array, Array]]
"""The steps of an unrolled stage: z before, s, z after."""


def unroll(equation: StageEquation, U: Array, z: Array, steps: int) -> Chain:
    """The given number of steps from z (S, B, n), with the drive U (S, B, n)."""
    chain = []
    for _ in range(steps):
        s = z @ transposed(equation.R) + U
        after = equation.f(s)
        chain.append((z, s, after))
        z = after
    return chain


def pull_back(slope: Callable[[Array, Array], Array], chain: Chain, R: Array, λ: Array, g: StageWeights) -> Array:
    """∂L/∂U from λ = ∂L/∂z after the last step; ∂L/∂R is added to g.recurrent."""
    E = np.zeros_like(λ)
    for before, s, after in reversed(chain):
        e = slope(s, after) * λ
        E += e
        g.recurrent += transposed(e) @ before
        λ = e @ R
    return E


def push_forward(slope: Callable[[Array, Array], Array], chain: Chain, R: Array, dR: Array, drive: Array) -> Array:
    """z′ after the last step, for the tangents of R and of U, ``drive``."""
    dz = np.zeros_like(drive)
    for before, s, after in chain:
        dz = slope(s, after) * (drive + before @ transposed(dR) + dz @ transposed(R))
    return dz
