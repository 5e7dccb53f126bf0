"""The linear systems of adjoints and tangents, (I - M) x = b, one for each sample of each net."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from implicit_rnn.engines.numpy.solvers import solve_each
from implicit_rnn.norms import norm
from implicit_rnn.solvers import Adjoint, Implicit, tolerance

Array = np.ndarray

_FEW_SAMPLES, _TINY = 32, 8
"""Samples and neurons up to which LU is faster than the Neumann series."""
_SERIES, _STEPS = 60, 4
"""The least number of terms of the series that cost no more than LU, and the terms between two checks of the residual."""
_TINY_SIZE = {name: 16 * float(np.sqrt(np.finfo(name).tiny) / np.finfo(name).eps) for name in ("float32", "float64")}
"""The norm of a right-hand side below which the square of a residual may vanish, whatever the tolerance."""
_TILE_NUMBERS = 1 << 22
"""Numbers in the largest temporary array of the adjoint."""


def solve_systems(
    product: Callable[[Array], Array], matrix: Callable[[Array], Array], b: Array, residual: Array, adjoint: Adjoint
) -> Array:
    """x with (I - M) x = b: by the Neumann series where it converges fast, else by one LU factorisation per sample.

    ``product`` multiplies by M, ``matrix`` gives the M (S, m, n, n) of some samples (m,). The relative residuals are merged
    into ``residual`` (S, B).
    """
    n, dtype = b.shape[-1], b.dtype
    # Squares of tiny numbers underflow, and residuals with them: such systems are solved scaled up.
    tiny = norm(b) < _TINY_SIZE[dtype.name]
    if tiny.any():
        largest = np.abs(b).max(axis=-1)
        tiny &= largest > 0
        if tiny.any():
            scale = np.ldexp(dtype.type(1), np.where(tiny, np.frexp(largest)[1], 0))[..., None]
            return solve_systems(product, matrix, b / scale, residual, adjoint) * scale
    x, size = np.empty_like(b), np.full(residual.shape, np.inf)
    series = residual.size >= _FEW_SAMPLES and n > _TINY
    if series and isinstance(adjoint, Implicit) and adjoint.linear_solver == "auto":
        limit = min(adjoint.max_iterations, max(_SERIES, n))
        x, size = _neumann_series(product, b, tolerance(adjoint.tol, dtype), limit)
    left = np.flatnonzero((size == np.inf).any(axis=0))
    identity = np.eye(n, dtype=dtype)
    width = max(1, _TILE_NUMBERS // (n * n * len(b)))
    for first in range(0, len(left), width):
        some = left[first : first + width]
        A = identity - matrix(some)
        solution = solve_each(A, b[:, some, :, None])
        x[:, some] = solution[..., 0]
        length = np.maximum(norm(x[:, some]), np.finfo(dtype).tiny)
        size[:, some] = norm((A @ solution)[..., 0] - b[:, some]) / length
    np.maximum(residual, size, out=residual)
    return x


def _neumann_series(product: Callable[[Array], Array], b: Array, tol: float, limit: int) -> tuple[Array, Array]:
    """x = b + M x by iteration, and its relative residuals (S, B), infinite where more than ``limit`` terms would be needed."""
    tiny = np.finfo(b.dtype).tiny
    x, taken, steps, before = b, 0, _STEPS, np.full(b.shape[:-1], np.inf)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        while True:
            for _ in range(steps):
                x, last = product(x), x
                x += b
            taken += steps
            size = norm(x - last) / np.maximum(norm(last), tiny)
            done = size <= tol
            predicted = np.ceil(steps * np.log(tol / size) / np.log(size / before))  # 0 at the first look
            possible = done | (predicted <= limit - taken)
            left = possible & ~done
            if taken >= limit or not left.any() or np.count_nonzero(possible) < done.size / 2:
                return last, np.where(done, size, np.inf)  # the iterate whose residual is known
            steps = int(max(_STEPS, predicted[left].max()))
            before = size
