"""Equations whose function is a Python function on NumPy arrays, solved and differentiated in Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from implicit_rnn.engines import base
from implicit_rnn.engines.base import SingularSolution
from implicit_rnn.engines.numpy.solvers import Equation, Outcome, _Rows, _Solve, norm
from implicit_rnn.errors import EngineError
from implicit_rnn.solution import CONVERGED, MAX_ITERATIONS, NON_FINITE, Solution
from implicit_rnn.solvers import Anderson, Auto, Newton, Picard, Solver

Array = np.ndarray

STATE = -1
"""The variable z among the arguments 0, 1, …"""

_BLOW_UP = 1e6
_SMALLEST_STEP = 2.0**-6
_PROBES = 8
_LARGEST_CHANGE = 0.25


class PythonEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: base.Equation) -> None:
        self._equation = equation
        self._state = equation.start

    def solve(self, solver: Solver, out: Solution) -> None:
        problem, self._state = self._equation, out.state
        if not isinstance(solver, (Auto, Newton) if problem.root else (Auto, Newton, Picard, Anderson)):
            raise EngineError(
                f"{solver.name} solves Julia code only; give f as irnn.julia(text), or use Newton() or Auto()"
            )
        dtype = problem.start.dtype
        tol = solver.tol or (1e-6 if dtype == np.float32 else 1e-10)
        outcome = Outcome.converged(1, problem.samples)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if problem.root:
                out.state[...] = _root(problem, tol, solver.max_iterations, outcome)
            else:
                out.state[...] = _FixedPoint(problem, tol, outcome).run(solver)[0][0]
        for name in ("status", "iterations", "residual", "rate"):
            getattr(out, name)[...] = getattr(outcome, name)[0]

    def vjp(self, v: Array) -> list[Array | None]:
        problem, state = self._equation, self._state
        rows = np.flatnonzero(v.any(axis=1))
        A = _isolated_jacobian(problem, state, rows)
        λ = -np.linalg.solve(A.swapaxes(1, 2), v[rows][..., None])[..., 0]
        gradients: list[Array | None] = []
        for index, argument in enumerate(problem.args):
            gradient = np.zeros_like(argument) if problem.is_differentiable(index) else None
            gradients.append(gradient)
            if gradient is None or not len(rows):
                continue
            for k, dF in enumerate(_derivatives(problem, state[rows], rows, index)):
                products = np.einsum("bi,bi->b", λ, dF)
                if problem.batched[index]:
                    gradient.reshape(problem.samples, -1)[rows, k] = products
                else:
                    gradient.reshape(-1)[k] = products.sum()
        return gradients

    def jacobian(self, index: int, wanted: Array) -> Array:
        problem, state = self._equation, self._state
        J = np.full((problem.samples, problem.n, problem.entries(index)), np.nan, state.dtype)
        rows = np.flatnonzero(wanted)
        if len(rows):
            B = np.stack(list(_derivatives(problem, state[rows], rows, index)), axis=-1)
            J[rows] = -np.linalg.solve(_isolated_jacobian(problem, state, rows), B)
        return J


# --- the user's function -------------------------------------------------------------------------------------


def _evaluate(
    problem: base.Equation, Z: Array, rows: Array, variable: int = STATE, value: Array | None = None
) -> Array:
    """f for Z (m, n) of the samples ``rows``; the argument ``variable`` may have another ``value``."""
    assert callable(problem.f)
    args = [a[rows] if batched else a for a, batched in zip(problem.args, problem.batched, strict=True)]
    if value is not None:
        args[variable] = value
    if problem.vectorized and not problem.single:
        return _checked(problem, problem.f(Z.copy(), *args), Z.shape)
    F = [
        _checked(
            problem,
            problem.f(z.copy(), *(a[b] if batched else a for a, batched in zip(args, problem.batched, strict=True))),
            z.shape,
        )
        for b, z in enumerate(Z)
    ]
    return np.stack(F) if F else Z.copy()


def _checked(problem: base.Equation, y: object, shape: tuple[int, ...]) -> Array:
    array = np.asarray(y)
    if array.shape != shape:
        raise ValueError(f"f returned an array of shape {array.shape}; expected {shape}, the shape of z")
    if array.dtype.kind not in "biufc":
        raise TypeError(f"f returned an array of dtype {array.dtype}; expected real numbers")
    dtype = problem.start.dtype
    return array if array.dtype.kind == "c" else array.astype(dtype, copy=False)


def _real(problem: base.Equation, Z: Array, rows: Array) -> Array:
    F = _evaluate(problem, Z, rows)
    if F.dtype.kind == "c":
        raise TypeError(f"f returned an array of dtype {F.dtype} for real input; expected real numbers")
    return F


# --- its derivatives -----------------------------------------------------------------------------------------


def _derivatives(problem: base.Equation, Z: Array, rows: Array, variable: int) -> Iterator[Array]:
    """∂f/∂x (m, n) for each entry x of a variable as one sample sees it.

    By the complex step where f proves to be differentiated rightly by it, else by central differences.
    """
    exact = _takes_complex_steps(problem, Z[:_PROBES], rows[:_PROBES], variable)
    x, per_row = _variable(problem, Z, rows, variable)
    size = x[0].size if per_row else x.size
    for k in range(size):
        direction = np.zeros(size, x.dtype)
        direction[k] = 1
        direction = direction.reshape(x.shape[1:] if per_row else x.shape)
        yield (_complex_step if exact else _central_difference)(problem, Z, rows, variable, direction)


def _variable(problem: base.Equation, Z: Array, rows: Array, variable: int) -> tuple[Array, bool]:
    if variable == STATE:
        return Z, True
    argument = problem.args[variable]
    return (argument[rows], True) if problem.batched[variable] else (argument, False)


def _shifted(problem: base.Equation, Z: Array, rows: Array, variable: int, shift: Array) -> Array:
    x = _variable(problem, Z, rows, variable)[0]
    if variable == STATE:
        return _evaluate(problem, x + shift, rows)
    return _evaluate(problem, Z, rows, variable, x + shift)


def _complex_step(problem: base.Equation, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
    """Squire and Trapp, SIAM Review 40, 1998: exact to rounding for analytic f."""
    h = 1e-20 if Z.dtype == np.float32 else 1e-100
    step = (direction * 1j * h).astype(np.result_type(Z.dtype, np.complex64))
    return (_shifted(problem, Z, rows, variable, step).imag / h).astype(Z.dtype)


def _central_difference(problem: base.Equation, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
    x, per_row = _variable(problem, Z, rows, variable)
    size = np.abs(x * direction)
    size = size.reshape(len(x), -1).max(axis=1) if per_row else size.max()
    # A power of two, so that x + h and x - h lie as far apart as they should but for the rounding of x.
    h = 2.0 ** np.round(np.log2(np.finfo(x.dtype).eps ** (1 / 3) * np.maximum(size, 1)))
    shift = direction * (h.reshape(-1, *[1] * (x.ndim - 1)) if per_row else h).astype(x.dtype)
    difference = _shifted(problem, Z, rows, variable, shift) - _shifted(problem, Z, rows, variable, -shift)
    return np.asarray(difference / (2 * np.reshape(h, (-1, 1)))).astype(Z.dtype)


def _takes_complex_steps(problem: base.Equation, Z: Array, rows: Array, variable: int) -> bool:
    """Whether the complex step agrees with a difference quotient, which it does not where f takes |x| or drops Im x."""
    x, per_row = _variable(problem, Z, rows, variable)
    shape = x.shape[1:] if per_row else x.shape
    direction = np.random.default_rng(0).uniform(0.5, 1, shape).astype(x.dtype)
    expected = _central_difference(problem, Z, rows, variable, direction)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _complex_step(problem, Z, rows, variable, direction)
    except Exception:
        return False
    tolerance = 1e-2 if Z.dtype == np.float32 else 1e-5
    return bool(np.allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(), equal_nan=True))


def _jacobian(problem: base.Equation, Z: Array, rows: Array) -> Array:
    """∂f/∂z (m, n, n)."""
    if not len(rows):
        return np.empty((0, problem.n, problem.n), Z.dtype)
    return np.stack(list(_derivatives(problem, Z, rows, STATE)), axis=-1)


def _conditions_jacobian(problem: base.Equation, Z: Array, rows: Array) -> Array:
    """A = ∂c/∂z of the conditions c = f(z) - z, or c = f(z) of a root."""
    J = _jacobian(problem, Z, rows)
    return J if problem.root else J - np.eye(problem.n, dtype=J.dtype)


def _isolated_jacobian(problem: base.Equation, state: Array, rows: Array) -> Array:
    """A at the solution of the samples ``rows``.

    ``SingularSolution`` where A is singular to rounding, or changes so much within the error δ = A⁻¹c of the solution that
    none need be isolated: ‖A(z)⁻¹A(z - δ) - I‖ > 1/4, which at a double root is 1/2 (Newton and Kantorovich).
    """
    Z = state[rows]
    A = _conditions_jacobian(problem, Z, rows)
    if not len(rows):
        return A
    finite = np.isfinite(A).all(axis=(1, 2))
    singular_values = np.linalg.svd(np.where(finite[:, None, None], A, 0), compute_uv=False)
    singular = singular_values[:, -1] <= np.finfo(A.dtype).eps * problem.n * singular_values[:, 0]
    if not singular.any():
        c = _real(problem, Z, rows) - (0 if problem.root else Z)
        δ = np.linalg.solve(A, c[..., None])[..., 0]
        change = np.linalg.solve(A, _conditions_jacobian(problem, Z - δ, rows)) - np.eye(problem.n, dtype=A.dtype)
        singular = ~(np.abs(change).sum(axis=1).max(axis=-1) <= _LARGEST_CHANGE)
    if singular.any():
        raise SingularSolution(int(rows[np.flatnonzero(singular)[0]]))
    return A


def _solve_each(A: Array, b: Array) -> tuple[Array, Array]:
    """A⁻¹b for each row, and whether it exists; a singular A harms no other row."""
    try:
        x = np.linalg.solve(A, b[..., None])[..., 0]
    except np.linalg.LinAlgError:
        x = np.full_like(b, np.nan)
        for row in range(len(b)):
            try:
                x[row] = np.linalg.solve(A[row], b[row])
            except np.linalg.LinAlgError:
                continue
    return x, np.asarray(np.isfinite(x).all(axis=1))


# --- fixed points --------------------------------------------------------------------------------------------


class _FixedPoint(_Solve):
    """The solvers of the NumPy engine with f in the place of R z, the identity as activation, and u = 0."""

    def __init__(self, problem: base.Equation, tol: float, outcome: Outcome) -> None:
        identity = Equation(np.empty((1, 0, 0)), lambda S: S, lambda S, F: S, tol, check_stability=True)
        super().__init__(identity, np.zeros_like(problem.start)[None], problem.start[None], outcome)
        self.problem = problem
        self.first = np.full(problem.samples, np.nan)

    def product(self, rows: _Rows, V: Array) -> Array:
        return _real(self.problem, V, rows.index)

    def jacobian(self, rows: _Rows) -> Array:
        return _jacobian(self.problem, rows.Z, rows.index)

    def newton_direction(self, rows: _Rows) -> Array:
        r = rows.F - rows.Z
        step, exists = _solve_each(-_conditions_jacobian(self.problem, rows.Z, rows.index), r)
        return np.where(exists[:, None], step, r)

    def largest(self, rows: _Rows, residual: Array) -> Array:
        # By the residual at the start: z may have any unit.
        new = np.isnan(self.first[rows.index])
        self.first[rows.index[new]] = residual[new]
        return np.asarray(_BLOW_UP * np.maximum(self.first[rows.index], 1 + self.floor))


# --- roots ---------------------------------------------------------------------------------------------------


def _root(problem: base.Equation, tol: float, limit: int, outcome: Outcome) -> Array:
    """Newton's method with a line search on ‖f‖, until the step is small; the roots (B, n)."""
    state = problem.start.copy()
    floor = 1e-3 * np.sqrt(problem.n)
    rows = np.arange(problem.samples)
    Z, F = state.copy(), _real(problem, state, rows)
    iterations, last = np.ones(len(rows), np.int32), np.full(len(rows), np.inf)
    for k in range(limit + 1):
        size = norm(F)
        step, exists = _solve_each(_conditions_jacobian(problem, Z, rows), -F)
        length = np.where(exists, norm(step), np.where(size == 0, 0, np.inf))
        relative = length / np.maximum(norm(Z), floor)
        done, broken = relative <= tol, ~np.isfinite(size)
        stuck = ~exists if k < limit else np.ones_like(exists)
        moving = ~(done | broken | stuck)
        if moving.any():
            z, f, evaluations, better = _search_line(problem, Z[moving], step[moving], size[moving], rows[moving])
            stuck[np.flatnonzero(moving)[~better]] = True
            iterations[moving] += evaluations
        ended = done | broken | stuck
        status = np.where(done, CONVERGED, np.where(broken, NON_FINITE, MAX_ITERATIONS))
        rate = np.where(np.isfinite(last), length / last, 0)
        outcome.merge(
            rows[ended], status[ended], iterations[ended], np.where(broken, np.nan, relative)[ended], rate[ended]
        )
        # The last step is there, and as good as another iteration.
        state[rows[ended]] = np.where((done & exists)[:, None], Z + step, Z)[ended]
        if ended.all():
            break
        Z, F, rows = z[better], f[better], rows[~ended]
        iterations, last = iterations[~ended], length[~ended]
    return state


def _search_line(
    problem: base.Equation, Z: Array, step: Array, size: Array, rows: Array
) -> tuple[Array, Array, Array, Array]:
    """z + t step with t halved until ‖f‖ decreases: z, f, evaluations, and whether it did."""
    z, f = Z.copy(), Z.copy()
    evaluations, better = np.zeros(len(Z), np.int32), np.zeros(len(Z), bool)
    t = 1.0
    while t >= _SMALLEST_STEP and not better.all():
        trying = np.flatnonzero(~better)
        z[trying] = Z[trying] + Z.dtype.type(t) * step[trying]
        f[trying] = _real(problem, z[trying], rows[trying])
        evaluations[trying] += 1
        better[trying] = norm(f[trying]) < (1 - 1e-4 * t) * size[trying]
        t /= 2
    return z, f, evaluations, better
