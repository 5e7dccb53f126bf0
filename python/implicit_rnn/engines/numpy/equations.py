"""Equations whose function is a Python function on NumPy arrays, solved and differentiated in Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from implicit_rnn.engines import base
from implicit_rnn.engines.base import SingularSolution
from implicit_rnn.engines.numpy.solvers import Equation, Outcome, _Rows, _Solve, norm, solve_each
from implicit_rnn.errors import DerivativeWarning, EngineError, warn
from implicit_rnn.solution import CONVERGED, MAX_ITERATIONS, NON_FINITE, SINGULAR, Solution
from implicit_rnn.solvers import Anderson, Auto, Newton, Picard, Solver

Array = np.ndarray

STATE = -1
"""The variable z among the arguments 0, 1, …"""

_BLOW_UP = 1e6
_SMALLEST_STEP = 2.0**-20
_LARGEST_CHANGE = 0.25
_STILL_SHRINKS = 0.4
"""Steps that become smaller by this factor each lead to a solution that is small, not to the rounding of a large iterate."""


class PythonEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: base.Equation) -> None:
        self._equation = equation
        self._f = _Function(equation)
        self._state = equation.start
        self._inverses: Array | None = None

    def solve(self, solver: Solver, out: Solution) -> None:
        equation, self._state, self._inverses = self._equation, out.state, None
        if not isinstance(solver, (Auto, Newton) if equation.root else (Auto, Newton, Picard, Anderson)):
            raise EngineError(
                f"{solver.name} solves Julia code only; give f as irnn.julia(text), or use Newton() or Auto()"
            )
        tol = solver.tol or (1e-6 if equation.start.dtype == np.float32 else 1e-10)
        outcome = Outcome.converged(1, equation.samples)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if equation.root:
                out.state[...] = _Root(self._f, tol, solver).run(outcome)
            else:
                out.state[...] = _FixedPoint(self._f, tol, outcome).run(solver)[0][0]
        for name in ("status", "iterations", "residual", "rate"):
            getattr(out, name)[...] = getattr(outcome, name)[0]

    def vjp(self, v: Array) -> list[Array | None]:
        equation, state = self._equation, self._state
        rows = np.flatnonzero(v.any(axis=1))
        λ = -np.einsum("bki,bk->bi", self._inverse(rows), v[rows])
        gradients: list[Array | None] = []
        for index, argument in enumerate(equation.args):
            gradient = np.zeros_like(argument) if equation.is_differentiable(index) else None
            gradients.append(gradient)
            if gradient is None or not len(rows):
                continue
            for k, dF in enumerate(self._f.derivatives(state[rows], rows, index, certain=True)):
                products = np.einsum("bi,bi->b", λ, dF)
                if equation.batched[index]:
                    gradient.reshape(equation.samples, -1)[rows, k] = products
                else:
                    gradient.reshape(-1)[k] = products.sum()
        return gradients

    def jacobian(self, index: int, wanted: Array) -> Array:
        equation, state = self._equation, self._state
        J = np.full((equation.samples, equation.n, equation.entries(index)), np.nan, state.dtype)
        rows = np.flatnonzero(wanted)
        if len(rows):
            B = np.stack(list(self._f.derivatives(state[rows], rows, index, certain=True)), axis=-1)
            J[rows] = -self._inverse(rows) @ B
        return J

    def _inverse(self, rows: Array) -> Array:
        """A⁻¹ = (∂c/∂z)⁻¹ at the solution of the samples ``rows``, each found once.

        ``SingularSolution`` where A is singular to rounding, or changes so much within the error δ = A⁻¹c of the solution that
        none need be isolated: ‖A(z)⁻¹A(z - δ) - I‖ > 1/4, which at a double root is 1/2 (Newton and Kantorovich).
        """
        n = self._equation.n
        if self._inverses is None:
            self._inverses = np.empty((self._equation.samples, n, n), self._state.dtype)
            self._known = np.zeros(self._equation.samples, bool)
        new = rows[~self._known[rows]]
        if len(new):
            f, Z, identity = self._f, self._state[new], np.eye(n, dtype=self._state.dtype)
            A = f.conditions_jacobian(Z, new, certain=True)
            finite = np.isfinite(A).all(axis=(1, 2))
            size = np.where(finite, _column_sums(A), 0)
            inverse = solve_each(np.where(finite[:, None, None], A, np.nan), np.broadcast_to(identity, A.shape))
            singular = finite & ~(size * _column_sums(inverse) * np.finfo(A.dtype).eps * n < 1)
            if not singular.any():
                δ = np.einsum("bij,bj->bi", inverse, f.conditions(f.real(Z, new), Z))
                corrected = f.conditions_jacobian(np.where(finite[:, None], Z - δ, Z), new)
                singular = finite & ~(_column_sums(inverse @ corrected - identity) <= _LARGEST_CHANGE)
            if singular.any():
                raise SingularSolution(int(new[np.flatnonzero(singular)[0]]))
            self._inverses[new], self._known[new] = inverse, True
        return self._inverses[rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"equation": self._equation, "state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["equation"])  # type: ignore[misc]
        self._state = state["state"]


# --- the user's function -------------------------------------------------------------------------------------


class _Function:
    """The function of an equation: it is given copies and what it returns is copied, so that it may reuse its memory."""

    def __init__(self, equation: base.Equation) -> None:
        self.equation = equation
        self._analytic: dict[int, Array] = {}

    def __call__(self, Z: Array, rows: Array, variable: int = STATE, value: Array | None = None) -> Array:
        """f for Z (m, n) of the samples ``rows``; the argument ``variable`` may have another ``value``."""
        equation = self.equation
        assert callable(equation.f)
        if not len(Z):
            return Z.copy()
        args = [a[rows] if batched else a for a, batched in zip(equation.args, equation.batched, strict=True)]
        if value is not None:
            args[variable] = value
        if equation.vectorized and not equation.single:
            return self._checked(equation.f(Z.copy(), *args), Z.shape)
        F = [
            self._checked(
                equation.f(
                    z.copy() if equation.shape else z[0],
                    *(a[b] if batched else a for a, batched in zip(args, equation.batched, strict=True)),
                ),
                z.shape,
            )
            for b, z in enumerate(Z)
        ]
        return np.stack(F)

    def real(self, Z: Array, rows: Array) -> Array:
        """f for real z, of which it has to be real."""
        F = self(Z, rows)
        if F.dtype.kind == "c":
            raise TypeError(f"f returned an array of dtype {F.dtype} for real input; expected real numbers")
        return F

    def conditions(self, F: Array, Z: Array) -> Array:
        """c = f(z) - z, or c = f(z) of a root."""
        return F if self.equation.root else F - Z

    def _checked(self, y: object, shape: tuple[int, ...]) -> Array:
        if isinstance(y, tuple):
            raise TypeError(f"f returned a tuple of {len(y)}; expected one array of shape {shape}, like z")
        array = np.asarray(y)
        if array.shape == () and shape == (1,):
            array = array.reshape(1)  # one unknown may be answered by a number
        if array.shape != shape:
            raise ValueError(f"f returned an array of shape {array.shape}; expected {shape}, the shape of z")
        if array.dtype.kind not in "biufc":
            raise TypeError(f"f returned an array of dtype {array.dtype}; expected real numbers")
        return np.array(array, None if array.dtype.kind == "c" else self.equation.start.dtype)

    # --- derivatives -----------------------------------------------------------------------------------------

    def conditions_jacobian(self, Z: Array, rows: Array, certain: bool = False) -> Array:
        """A = ∂c/∂z (m, n, n)."""
        J = self.jacobian(Z, rows, certain)
        return J if self.equation.root else J - np.eye(self.equation.n, dtype=J.dtype)

    def jacobian(self, Z: Array, rows: Array, certain: bool = False) -> Array:
        """∂f/∂z (m, n, n)."""
        if not len(rows):
            return np.empty((0, self.equation.n, self.equation.n), Z.dtype)
        return np.stack(list(self.derivatives(Z, rows, STATE, certain)), axis=-1)

    def derivatives(self, Z: Array, rows: Array, variable: int, certain: bool = False) -> Iterator[Array]:
        """∂f/∂x (m, n) for each entry x of a variable as one sample sees it.

        By the complex step for rows on which it agrees with a difference quotient, else by difference quotients, of which
        those of one step and of half of it have to agree. If it is to be ``certain``, each row is examined at this Z, and
        rows without a trustworthy derivative are NaN and warned of; otherwise what was found at the first Z counts, and
        their best quotient serves.
        """
        if not len(rows):
            return
        known = self._analytic.get(variable)
        if certain or known is None:
            known = np.zeros(self.equation.samples, np.int8) if known is None or certain else known
            known[rows] = self._takes_complex_steps(Z, rows, variable)
            self._analytic[variable] = known
        analytic = known[rows].astype(bool)
        x, per_row = self._variable(Z, rows, variable)
        entries = x.shape[1:] if per_row else x.shape
        lost = np.zeros(len(rows), bool)
        for k in range(int(np.prod(entries, dtype=np.int64))):
            direction = np.zeros(entries, x.dtype)
            direction.reshape(-1)[k] = 1
            D = np.empty((len(rows), self.equation.n), Z.dtype)
            if analytic.any():
                chosen = np.flatnonzero(analytic)
                D[chosen] = self._complex_step(Z[chosen], rows[chosen], variable, direction)
            if not analytic.all():
                chosen = np.flatnonzero(~analytic)
                D[chosen], trusted = self._difference(Z[chosen], rows[chosen], variable, direction)
                if certain:
                    D[chosen[~trusted]] = np.nan
                    lost[chosen[~trusted]] = True
            yield D
        if lost.any():
            name = "z" if variable == STATE else self.equation.names[variable]
            warn(
                f"f has no trustworthy derivative with respect to {name} at the solution of {lost.sum()} samples (first sample "
                f"{rows[np.flatnonzero(lost)[0]]}): difference quotients of different steps disagree, as at a kink or in noise; "
                "these derivatives are NaN",
                DerivativeWarning,
            )

    def _variable(self, Z: Array, rows: Array, variable: int) -> tuple[Array, bool]:
        """Its values, and whether each row has its own."""
        if variable == STATE:
            return Z, True
        argument = self.equation.args[variable]
        return (argument[rows], True) if self.equation.batched[variable] else (argument, False)

    def _shifted(self, Z: Array, rows: Array, variable: int, shift: Array) -> Array:
        x = self._variable(Z, rows, variable)[0]
        return self(x + shift, rows) if variable == STATE else self(Z, rows, variable, x + shift)

    def _complex_step(self, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
        """Squire and Trapp, SIAM Review 40, 1998: exact to rounding for analytic f."""
        h = 1e-30 if Z.dtype == np.float32 else 1e-200
        step = (direction * 1j * h).astype(np.result_type(Z.dtype, np.complex64))
        return (self._shifted(Z, rows, variable, step).imag / h).astype(Z.dtype)

    def _difference(self, Z: Array, rows: Array, variable: int, direction: Array) -> tuple[Array, Array]:
        """Richardson's extrapolation of two central differences (m, n), and whether each row can be trusted.

        It can where the two differ, and the second differences shrink, as those of a smooth function do, and rounding counts
        for little; several steps are tried, in units of the variable.
        """
        x, per_row = self._variable(Z, rows, variable)
        m, eps = len(rows), float(np.finfo(Z.dtype).eps)
        tol = 2e-2 if Z.dtype == np.float32 else 1e-6
        moved = np.abs(x * direction).reshape(m if per_row else 1, -1).max(axis=1).astype(np.float64)
        others = np.abs(x).reshape(m if per_row else 1, -1).max(axis=1).astype(np.float64)
        size = np.where(moved > 0, moved, np.where(others > 0, others, 1.0))
        factors = [1.0, 1e-2, 1e2, 1e-4, 1e-6] + ([] if (moved > 0).all() else [1e-9, 1e-12, 1e-15, 1e-18, 1e6, 1e12])
        best, trusted = np.full((m, self.equation.n), np.nan), np.zeros(m, bool)
        center = self(Z, rows).astype(np.float64)
        for factor in factors:
            left = np.flatnonzero(~trusted)
            if not len(left):
                break
            step = 2.0 ** np.round(np.log2(eps ** (1 / 3) * size * factor))
            h = step[left] if per_row else np.broadcast_to(step, len(left))
            values = []
            for part in (1.0, -1.0, 0.5, -0.5):
                scaled = part * (step[left].reshape(-1, *[1] * (x.ndim - 1)) if per_row else step.reshape([1] * x.ndim))
                values.append(self._shifted(Z[left], rows[left], variable, (direction * scaled).astype(x.dtype)))
            plus, minus, plus2, minus2 = (v.astype(np.float64) for v in values)
            coarse, fine = (plus - minus) / (2 * h[:, None]), (plus2 - minus2) / h[:, None]
            bend = np.abs(plus - 2 * center[left] + minus) / h[:, None]
            bend2 = np.abs(plus2 - 2 * center[left] + minus2) / (h[:, None] / 2)
            noise = eps * np.abs(plus).max(axis=1) / (h / 2)
            large = np.abs(fine).max(axis=1)
            unequal, kinked = np.abs(coarse - fine).max(axis=1), (bend2 - 0.75 * bend).max(axis=1)
            flat = (large == 0) & (np.abs(coarse).max(axis=1) == 0) & (bend.max(axis=1) == 0)
            good = flat | (
                (unequal <= 100 * tol * np.maximum(large, bend.max(axis=1)))
                & (noise <= 100 * tol * np.maximum(large, bend.max(axis=1)))
                & (kinked <= tol * large + 4 * noise)
            )
            value = np.where(good[:, None], fine + (fine - coarse) / 3, fine)
            first = np.isnan(best[left]).all(axis=1)
            best[left[good | first]] = value[good | first]
            trusted[left[good]] = True
        return best.astype(Z.dtype), trusted

    def _takes_complex_steps(self, Z: Array, rows: Array, variable: int) -> Array:
        """Whether on each row the complex step agrees with a difference quotient, which it does not where f drops Im x."""
        x, per_row = self._variable(Z, rows, variable)
        shape = x.shape[1:] if per_row else x.shape
        weights = np.random.default_rng(0).uniform(0.5, 1, shape)
        size = np.abs(x).max(axis=0) if per_row and len(x) else np.abs(x)
        direction = (weights * np.where(size > 0, size, size.max(initial=0) or 1) / (size.max(initial=0) or 1)).astype(
            x.dtype
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self._complex_step(Z, rows, variable, direction)
        except Exception:
            return np.zeros(len(rows), bool)
        expected, trusted = self._difference(Z, rows, variable, direction)
        tolerance = 1e-1 if Z.dtype == np.float32 else 1e-3
        error = np.abs(found - expected).max(axis=1)
        return np.asarray(trusted & (error <= tolerance * np.abs(expected).max(axis=1)))


def _column_sums(A: Array) -> Array:
    """The largest column sum of each matrix."""
    return np.asarray(np.abs(A).sum(axis=1).max(axis=-1, initial=0))


def _length(V: Array) -> Array:
    """Euclidean norms, one a row, in double precision and without overflow or underflow on the way."""
    W = np.abs(V.astype(np.float64))
    unit = W.max(axis=-1, initial=0)
    unit = np.where((unit > 0) & np.isfinite(unit), unit, 1)
    return np.asarray(unit * norm(W / unit[:, None]))


class _Sizes:
    """Sizes of z without a unit: in that of ``scale`` where there is one, in double precision."""

    def __init__(self, equation: base.Equation, tol: float) -> None:
        self.weights = 1.0 if equation.scale is None else 1 / equation.scale.astype(np.float64)
        self.floor = 0.0 if equation.scale is None else float(np.sqrt(equation.n))
        self.tol, self.eps = tol, float(np.finfo(equation.start.dtype).eps)
        self.largest = self(equation.start)

    def __call__(self, V: Array) -> Array:
        return _length(V.astype(np.float64) * self.weights)

    def reference(self, size: Array, index: Array) -> Array:
        """What a step is related to, for iterates of that size of the samples ``index``."""
        self.largest[index] = np.fmax(self.largest[index], size)
        return np.maximum(np.maximum(size, self.floor), self.eps * self.largest[index] / self.tol)

    def near(self, step: Array, size: Array, index: Array, rate: Array, spent: Array) -> Array:
        """Whether steps end the iteration, see ``engines.base.Equation``."""
        rounding = (step <= self.eps * self.largest[index]) & ((rate > _STILL_SHRINKS) | spent | (step == 0))
        return np.asarray((step <= self.tol * np.maximum(size, self.floor)) | rounding)


# --- fixed points --------------------------------------------------------------------------------------------


class _FixedPoint(_Solve):
    """The solvers of the NumPy engine with f in the place of R z, the identity as activation, and u = 0."""

    def __init__(self, f: _Function, tol: float, outcome: Outcome) -> None:
        identity = Equation(np.empty((1, 0, 0)), lambda S: S, lambda S, F: S, tol, check_stability=True)
        start = f.equation.start
        super().__init__(identity, np.zeros_like(start)[None], start[None], outcome)
        self.f, self.sizes = f, _Sizes(f.equation, tol)
        self.outset = np.full(f.equation.samples, np.nan)

    def product(self, rows: _Rows, V: Array) -> Array:
        return self.f.real(V, rows.index)

    def size(self, V: Array) -> Array:
        return self.sizes(V)

    def scale(self, rows: _Rows) -> Array:
        return self.sizes.reference(self.sizes(rows.F), rows.index)

    def is_near(self, rows: _Rows, scale: Array, spent: Array) -> Array:
        return self.sizes.near(rows.residual, self.sizes(rows.F), rows.index, self.rate, spent)

    def jacobian(self, rows: _Rows) -> Array:
        return self.f.jacobian(rows.Z, rows.index)

    def newton_direction(self, rows: _Rows) -> Array:
        r = rows.F - rows.Z
        step = solve_each(-self.f.conditions_jacobian(rows.Z, rows.index), r[..., None])[..., 0]
        exists = np.isfinite(step).all(axis=1)
        self.singular[rows.index] = ~exists
        return np.where(exists[:, None], step, r)

    def largest(self, rows: _Rows) -> Array:
        # By the sizes at the start: z may have any unit.
        new = np.isnan(self.outset[rows.index])
        fresh = rows.index[new]
        self.outset[fresh] = np.maximum(self.sizes(rows.Z[new]), self.sizes(rows.F[new]))
        return np.asarray(_BLOW_UP * self.outset[rows.index])


# --- roots ---------------------------------------------------------------------------------------------------


class _Root:
    """Newton's method with a line search on ‖f‖ until the step is small, and Powell's hybrid method for what it leaves."""

    def __init__(self, f: _Function, tol: float, solver: Solver) -> None:
        self.f, self.tol, self.limit = f, tol, int(solver.max_iterations)
        self.hybrid = isinstance(solver, Auto)
        self.sizes = _Sizes(f.equation, tol)

    def run(self, outcome: Outcome) -> Array:
        """The roots (B, n)."""
        start = self.f.equation.start
        samples = np.arange(len(start))
        first = max(self.limit // 5, min(self.limit, 60)) if self.hybrid else self.limit
        Z, status, evaluations, residual, rate = self.newton(start, samples, np.zeros(len(start), np.int32), first)
        for k in np.flatnonzero((status == SINGULAR) | (status == MAX_ITERATIONS)) if self.hybrid else ():
            for factor, scaled in ((100.0, True), (1.0, True), (1.0, False), (0.1, True)):
                if evaluations[k] >= self.limit:
                    break
                z, used = self.powell(start[k], int(k), self.limit - int(evaluations[k]), factor, scaled)
                evaluations[k] += used
                one = slice(k, k + 1)
                found = self.newton(z[None], samples[one], evaluations[one], self.limit)
                if found[1][0] == CONVERGED or factor == 0.1:
                    Z[one], status[one], evaluations[one], residual[one], rate[one] = found
                    if status[k] == CONVERGED:
                        break
                else:
                    evaluations[one] = found[2]
        outcome.merge(samples, status, evaluations, residual, rate)
        return Z

    def newton(self, start: Array, rows: Array, used: Array, limit: int) -> tuple[Array, ...]:
        """Roots, statuses, evaluations (``used`` before), relative steps and rates of the samples ``rows``."""
        f, sizes, count = self.f, self.sizes, len(rows)
        Z, status = start.copy(), np.full(count, MAX_ITERATIONS)
        evaluations, residual, rate = used.astype(np.int32), np.full(count, np.inf), np.zeros(count)
        last = np.full(count, np.inf)
        F = np.full_like(Z, np.nan)
        going = np.flatnonzero(evaluations < limit)
        if len(going):
            F[going] = f.real(Z[going], rows[going])
            evaluations[going] += 1
        while len(going):
            index, z, c = rows[going], Z[going], F[going]
            merit = _length(c)
            step = solve_each(f.conditions_jacobian(z, index), -c[..., None])[..., 0]
            exists = np.isfinite(step).all(axis=1)
            length = np.where(exists, sizes(np.where(exists[:, None], step, 0)), np.where(merit == 0, 0, np.inf))
            size = sizes(z)
            reference = sizes.reference(size, index)
            quotient = np.where(np.isfinite(last[going]), length / np.where(last[going] > 0, last[going], 1), 0)
            spent = evaluations[going] >= limit
            done = sizes.near(length, size, index, quotient, spent)
            broken = ~np.isfinite(merit)
            residual[going] = np.where(broken, np.nan, np.where(length == 0, 0, length / reference))
            rate[going], last[going] = quotient, length
            # The last step is there, and as good as another iteration.
            Z[going] = np.where((done & exists)[:, None], z + step, z)
            status[going] = np.where(
                done, CONVERGED, np.where(broken, NON_FINITE, np.where(exists, MAX_ITERATIONS, SINGULAR))
            )
            moving = ~(done | broken | ~exists | spent)
            going, step, merit = going[moving], step[moving], merit[moving]
            going = self.search(Z, F, rows, going, step, merit, evaluations, status, limit)
        return Z, status, evaluations, residual, rate

    def search(
        self,
        Z: Array,
        F: Array,
        rows: Array,
        going: Array,
        step: Array,
        merit: Array,
        evaluations: Array,
        status: Array,
        limit: int,
    ) -> Array:
        """z + t step with t halved until ‖f‖ decreases; returns those of ``going`` where it did."""
        base, t, better = Z[going].copy(), 1.0, np.zeros(len(going), bool)
        while t >= _SMALLEST_STEP:
            trying = np.flatnonzero(~better & (evaluations[going] < limit))
            if not len(trying):
                break
            z = base[trying] + base.dtype.type(t) * step[trying]
            c = self.f.real(z, rows[going[trying]])
            evaluations[going[trying]] += 1
            good = _length(c) < (1 - 1e-4 * t) * merit[trying]
            Z[going[trying[good]]], F[going[trying[good]]] = z[good], c[good]
            better[trying[good]] = True
            t /= 2
        status[going[~better & (evaluations[going] < limit)]] = SINGULAR
        return going[better]

    def powell(self, start: Array, sample: int, budget: int, factor: float, scaled: bool) -> tuple[Array, int]:
        """MINPACK's hybrid method by SciPy, on unknowns and conditions of the size 1; the best iterate, and evaluations."""
        from scipy import optimize

        f, row = self.f, np.array([sample])
        dtype, used = start.dtype, 0
        best, best_merit = start.copy(), np.inf
        c0 = f.real(start[None], row)
        used += 1
        unit_of_c = float(_length(c0)[0])
        unit = float(self.sizes(start[None])[0]) if isinstance(self.sizes.weights, float) else 1.0
        units = np.full(len(start), unit) if isinstance(self.sizes.weights, float) else 1 / self.sizes.weights
        units = np.where(units > 0, units, 1.0)
        if not (np.isfinite(unit_of_c) and unit_of_c > 0):
            return best, used

        def conditions(x: Array) -> Array:
            nonlocal used, best, best_merit
            if used >= budget:
                raise _SpentError
            used += 1
            z = (x * units).astype(dtype)
            c = f.real(z[None], row)[0].astype(np.float64) / unit_of_c
            if not np.isfinite(c).all():
                return np.full(len(x), 1e30)
            if (merit := float(np.linalg.norm(c))) < best_merit:
                best, best_merit = z, merit
            return c

        def jacobian(x: Array) -> Array:
            z = (x * units).astype(dtype)
            J = f.conditions_jacobian(z[None], row)[0].astype(np.float64) * units / unit_of_c
            return np.where(np.isfinite(J), J, 0)

        options = {"factor": factor, "xtol": 1e-13, "maxfev": budget} | (
            {} if scaled else {"diag": np.ones(len(start))}
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimize.root(
                    conditions, start.astype(np.float64) / units, jac=jacobian, method="hybr", options=options
                )
        except _SpentError:
            pass
        return best, used


class _SpentError(Exception):
    pass
