"""Equations whose function is a Python function on NumPy arrays, solved and differentiated in Python."""

from __future__ import annotations

import contextlib
import warnings
from math import inf
from typing import Any

import numpy as np

from implicit_rnn.engines import base
from implicit_rnn.engines.base import LARGEST_CHANGE, SingularSolution
from implicit_rnn.engines.numpy import single
from implicit_rnn.engines.numpy.functions import Function
from implicit_rnn.engines.numpy.linear import Operator, UnsolvedError, is_isolated
from implicit_rnn.engines.numpy.solvers import (
    BLOCK,
    BLOW_UP,
    PATIENCE,
    Equation,
    Outcome,
    Rows,
    Solve,
    decreases,
    norm,
    solve_each,
)
from implicit_rnn.errors import ConvergenceError, EngineError
from implicit_rnn.solution import CONVERGED, MAX_ITERATIONS, NON_FINITE, SINGULAR, Solution
from implicit_rnn.solvers import Anderson, Auto, Newton, Picard, Solver, tolerance

Array = np.ndarray

_FORWARD = 64
"""Numbers among the arguments for each of which a system may be solved where the transposed one cannot be."""
_PART = 2**24
"""Numbers that derivatives may take at a time."""
_LEFT_OF_CONDITIONS = 0.5
"""What is left of ‖c‖ behind a step to a root, at most."""


class PythonEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: base.Equation) -> None:
        self._equation = equation
        self._f = Function(equation)
        self._state = equation.start
        self._inverses: Array | None = None
        self._operators: dict[int, Operator] = {}

    def solve(self, solver: Solver, out: Solution) -> None:
        equation, self._state, self._inverses = self._equation, out.state, None
        self._operators = {}
        if not isinstance(solver, (Auto, Newton) if equation.root else (Auto, Newton, Picard, Anderson)):
            raise EngineError(
                f"{solver.name} solves Julia code only; give f as irnn.julia(text), or use Newton() or Auto()"
            )
        tol = tolerance(solver.tol, equation.start.dtype)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if found := _find_single(equation, tol, solver):
                out.state[0], out.iterations[0], out.residual[0], out.rate[0] = found
                out.status[0] = CONVERGED
                return
            outcome = Outcome.converged(1, equation.samples)
            if equation.root:
                out.state[...] = _Root(self._f, tol, solver).run(outcome)
            else:
                out.state[...] = _FixedPoint(self._f, tol, outcome).run(solver)[0][0]
            self._f.check_separate(out.state)
        outcome.write(out)

    def vjp(self, v: Array) -> list[Array | None]:
        rows = np.flatnonzero(v.any(axis=1))
        if not self._f.is_large():
            return self._products(-np.einsum("bki,bk->bi", self._inverse(rows), v[rows]), rows)
        operators = [self._operator(int(row)) for row in rows]
        if all(operator.has_transpose for operator in operators):
            solutions = [
                self._solved(o, v[row], int(row), transposed=True) for o, row in zip(operators, rows, strict=True)
            ]
            return self._products(-np.stack(solutions).astype(v.dtype) if len(rows) else v[rows], rows)
        return self._products_forward(v, rows)

    def _products(self, λ: Array, rows: Array) -> list[Array | None]:
        """The sums λᵀ ∂f/∂argument over the samples ``rows`` that share it."""
        equation, f = self._equation, self._f
        given: list[Any] = [None] * (1 + len(equation.args))
        if equation.vjp is not None and len(rows):
            given = f.products(λ, self._state[rows], rows)
            f.check_products(λ, given, self._state[rows], rows)
        gradients: list[Array | None] = []
        for index, argument in enumerate(equation.args):
            gradient = np.zeros_like(argument) if equation.is_differentiable(index) else None
            gradients.append(gradient)
            if gradient is None or not len(rows):
                continue
            if given[index + 1] is not None:
                gradient[rows if equation.batched[index] else ...] = given[index + 1]
                continue
            flat = gradient.reshape(equation.samples if equation.batched[index] else 1, -1)
            for part in _parts(len(rows), equation.entries(index)):
                Z, own = self._state[rows[part]], rows[part]
                for inputs, outputs, D in f.derivatives(Z, own, index, certain=True):
                    products = λ[part][:, outputs] * D
                    if equation.batched[index]:
                        np.add.at(flat, (own[:, None], inputs), products)
                    else:
                        np.add.at(flat[0], inputs, products.sum(axis=0))
        return gradients

    def _products_forward(self, v: Array, rows: Array) -> list[Array | None]:
        """As ``vjp``, by a system for each entry of an argument, where there are no products with the transposed Jacobian."""
        equation = self._equation
        floats = [index for index in range(len(equation.args)) if equation.is_differentiable(index)]
        if sum(equation.entries(index) for index in floats) > _FORWARD:
            raise EngineError(
                f"the gradient of {equation.n} unknowns with respect to more than {_FORWARD} numbers needs products with the "
                "transposed Jacobian of f, and f couples too many unknowns to find them from its values (the dense Jacobian "
                f"would take {equation.n**2 * 8 / 2**30:.2g} GiB): give vjp=, or jac= as a sparse matrix"
            )
        gradients: list[Array | None] = [np.zeros_like(a) if k in floats else None for k, a in enumerate(equation.args)]
        wanted = np.zeros(equation.samples, bool)
        wanted[rows] = True
        for index in floats:
            products = np.einsum("bi,bik->bk", v[rows], self.jacobian(index, wanted)[rows])
            gradient = gradients[index]
            assert gradient is not None
            if equation.batched[index]:
                gradient.reshape(equation.samples, -1)[rows] = products
            else:
                gradient.reshape(-1)[:] = products.sum(axis=0)
        return gradients

    def jacobian(self, index: int, wanted: Array) -> Array:
        equation, f = self._equation, self._f
        J = np.full((equation.samples, equation.n, equation.entries(index)), np.nan, self._state.dtype)
        rows = np.flatnonzero(wanted)
        for part in _parts(len(rows), equation.n * equation.entries(index)):
            own = rows[part]
            B = f.argument_jacobian(self._state[own], own, index)
            if not f.is_large():
                J[own] = -self._inverse(own) @ B
                continue
            for row, b in zip(own, B, strict=True):
                operator = self._operator(int(row))
                J[row] = -np.stack([self._solved(operator, column, int(row)) for column in b.T], axis=-1)
        return J

    def _operator(self, row: int) -> Operator:
        """∂c/∂z at the solution of one sample with many unknowns, found once; ``SingularSolution`` as ``_inverse``."""
        if row not in self._operators:
            f, z, own = self._f, self._state[row], np.array([row])
            operator = f.operator(z, row, certain=True)
            δ = self._solved(operator, f.conditions(f.real(z[None], own), z[None])[0], row)
            nearby = f.operator((z - δ).astype(z.dtype), row)
            try:
                if not is_isolated(operator, nearby, δ):
                    raise SingularSolution(row)
            except UnsolvedError:
                raise SingularSolution(row) from None
            self._operators[row] = operator
        return self._operators[row]

    def _solved(self, operator: Operator, b: Array, row: int, transposed: bool = False) -> Array:
        try:
            return operator.solve(b, transposed)
        except UnsolvedError:
            if operator.matrix is not None:
                raise SingularSolution(row) from None
            raise ConvergenceError(
                f"GMRES did not solve the linear system of {operator.n} unknowns at the solution, which has no derivative if the "
                "Jacobian of f is singular there; if it is not, give jac= as a sparse matrix, which is then factorised"
            ) from None

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
                singular = finite & ~(_column_sums(inverse @ corrected - identity) <= LARGEST_CHANGE)
            if singular.any():
                raise SingularSolution(int(new[np.flatnonzero(singular)[0]]))
            self._inverses[new], self._known[new] = inverse, True
        return self._inverses[rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"equation": self._equation, "state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["equation"])  # type: ignore[misc]
        self._state = state["state"]


def _find_single(equation: base.Equation, tol: float, solver: Solver) -> single.Found | None:
    limit = int(solver.max_iterations)
    if equation.root:
        return single.find_root(equation, tol, _newton_limit(solver))
    if isinstance(solver, Auto):
        return single.find_fixed_point(equation, tol, limit, BLOCK, PATIENCE)
    if isinstance(solver, Picard) and solver.damping == 1:
        return single.find_fixed_point(equation, tol, limit, limit, inf)
    return None


def _newton_limit(solver: Solver) -> int:
    """Evaluations of the first attempt at a root, which leaves some for the next."""
    limit = int(solver.max_iterations)
    return max(limit // 5, min(limit, 60)) if isinstance(solver, Auto) else limit


def _parts(rows: int, numbers: int) -> list[slice]:
    """The samples in parts that take not too many numbers."""
    size = max(1, _PART // max(numbers, 1))
    return [slice(k, k + size) for k in range(0, rows, size)]


def _newton_steps(f: Function, Z: Array, rows: Array, C: Array) -> Array:
    """-A⁻¹c (m, n), not finite where A has no inverse."""
    if not f.is_large():
        return solve_each(f.conditions_jacobian(Z, rows), -C[..., None])[..., 0]
    steps = np.full_like(Z, np.nan)
    for k, row in enumerate(rows):
        with contextlib.suppress(UnsolvedError):
            steps[k] = f.operator(Z[k], int(row)).solve(-C[k])
    return steps


def _is_steady(f: Function, Z: Array, rows: Array, steps: Array, C: Array) -> Array:
    """Whether A is about the same two steps further, along the step.

    A short step to a root makes the conditions much smaller than they were, unless one starts there. Newton's steps are as
    short at a pole, from which they lead away, and where f has an infinite slope, as √z + 1 at zero.
    """
    further = Z + 2 * steps + 8 * np.finfo(Z.dtype).eps * Z
    if f.is_large():
        products = np.stack(
            [f.operator(z, int(row)).product(d) for z, row, d in zip(further, rows, steps, strict=True)]
        )
    else:
        products = (f.conditions_jacobian(further, rows) @ steps[..., None])[..., 0]
    return np.asarray(_length(products + C) <= 0.5 * _length(C))


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
        self.largest = np.zeros(equation.samples)

    def __call__(self, V: Array) -> Array:
        return _length(V.astype(np.float64) * self.weights)

    def begin(self, index: Array) -> None:
        """The samples ``index`` begin, whatever was seen on the way before."""
        self.largest[index] = 0

    def pass_by(self, size: Array, index: Array) -> None:
        """Iterates of that size are on the way of the samples ``index``; trial steps that are taken back are not."""
        self.largest[index] = np.fmax(self.largest[index], size)

    def reference(self, size: Array, index: Array) -> Array:
        """What a step is related to, at iterates of that size of the samples ``index``."""
        return np.maximum(np.maximum(size, self.floor), self.rounding(size, index) / self.tol)

    def rounding(self, size: Array, index: Array) -> Array:
        """That of the largest iterate on the way."""
        return np.asarray(self.eps * np.fmax(self.largest[index], size))

    def near(self, step: Array, size: Array, index: Array, rate: Array, spent: Array) -> Array:
        """Whether steps end the iteration, see ``engines.base.Equation``."""
        rounding = (step <= self.rounding(size, index)) & ((rate > single.STILL_SHRINKS) | spent | (step == 0))
        return np.asarray((step <= self.tol * np.maximum(size, self.floor)) | rounding)


# --- fixed points --------------------------------------------------------------------------------------------


class _FixedPoint(Solve):
    """The solvers of the NumPy engine with f in the place of R z, the identity as activation, and u = 0."""

    def __init__(self, f: Function, tol: float, outcome: Outcome) -> None:
        identity = Equation(np.empty((1, 0, 0)), lambda S: S, lambda S, F: S, tol, check_stability=True)
        start = f.equation.start
        super().__init__(identity, np.zeros_like(start)[None], start[None], outcome)
        self.f, self.sizes = f, _Sizes(f.equation, tol)
        self.outset = np.full(f.equation.samples, np.nan)

    def product(self, rows: Rows, V: Array) -> Array:
        return self.f.real(V, rows.index)

    def size(self, V: Array) -> Array:
        return self.sizes(V)

    def scale(self, rows: Rows) -> Array:
        return self.sizes.reference(self.sizes(rows.F), rows.index)

    def accept(self, rows: Rows) -> None:
        self.sizes.pass_by(self.sizes(rows.F), rows.index)

    def restart(self, rows: Rows) -> Array:
        start = self.f.equation.start[rows.index]
        self.sizes.begin(rows.index)
        return start

    def is_near(self, rows: Rows, scale: Array, spent: Array) -> Array:
        return self.sizes.near(rows.residual, self.sizes(rows.F), rows.index, self.rate, spent)

    def jacobian(self, rows: Rows) -> Array:
        return self.f.jacobian(rows.Z, rows.index)

    def newton_direction(self, rows: Rows) -> Array:
        r = rows.F - rows.Z
        step = _newton_steps(self.f, rows.Z, rows.index, r)
        exists = np.isfinite(step).all(axis=1)
        self.singular[rows.index] = ~exists
        return np.where(exists[:, None], step, r)

    def repels(self, rows: Rows) -> Array:
        if not self.f.is_large():
            return super().repels(rows)
        return np.array([self.f.operator(z, int(k)).repels() for z, k in zip(rows.Z, rows.index, strict=True)], bool)

    def largest(self, rows: Rows) -> Array:
        # By the sizes at the start: z may have any unit.
        new = np.isnan(self.outset[rows.index])
        fresh = rows.index[new]
        self.outset[fresh] = np.maximum(self.sizes(rows.Z[new]), self.sizes(rows.F[new]))
        return np.asarray(BLOW_UP * self.outset[rows.index])


# --- roots ---------------------------------------------------------------------------------------------------


class _Root:
    """Newton's method with a line search on ‖f‖ until the step is small, and Powell's hybrid method for what it leaves."""

    def __init__(self, f: Function, tol: float, solver: Solver) -> None:
        self.f, self.tol, self.solver, self.limit = f, tol, solver, int(solver.max_iterations)
        self.hybrid = isinstance(solver, Auto) and not f.is_large()
        self.sizes = _Sizes(f.equation, tol)

    def run(self, outcome: Outcome) -> Array:
        """The roots (B, n)."""
        start = self.f.equation.start
        samples = np.arange(len(start))
        first = _newton_limit(self.solver) if self.hybrid else self.limit
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
        last, last_merit = np.full(count, np.inf), np.full(count, np.inf)
        F = np.full_like(Z, np.nan)
        sizes.begin(rows)
        going = np.flatnonzero(evaluations < limit)
        if len(going):
            F[going] = f.real(Z[going], rows[going])
            evaluations[going] += 1
        while len(going):
            index, z, c = rows[going], Z[going], F[going]
            merit = _length(c)
            step = _newton_steps(f, z, index, c)
            exists = np.isfinite(step).all(axis=1)
            length = np.where(exists, sizes(np.where(exists[:, None], step, 0)), np.where(merit == 0, 0, np.inf))
            size = sizes(z)
            sizes.pass_by(size, index)
            reference = sizes.reference(size, index)
            quotient = np.where(np.isfinite(last[going]), length / np.where(last[going] > 0, last[going], 1), 0)
            spent = evaluations[going] >= limit
            done = sizes.near(length, size, index, quotient, spent)
            proven = np.isfinite(last[going]) & (merit <= _LEFT_OF_CONDITIONS * last_merit[going])
            last_merit[going] = merit
            doubtful = done & exists & ~proven & (merit > 0)
            if doubtful.any():
                done[doubtful] = _is_steady(f, z[doubtful], index[doubtful], step[doubtful], c[doubtful])
            broken = ~np.isfinite(merit)
            residual[going] = np.where(broken, np.nan, np.where(length == 0, 0, length / reference))
            rate[going], last[going] = quotient, np.where(doubtful & ~done, np.inf, length)
            # The last step is there, and as good as another iteration.
            Z[going] = np.where((done & exists)[:, None], z + step, z)
            status[going] = np.where(
                done, CONVERGED, np.where(broken, NON_FINITE, np.where(exists, MAX_ITERATIONS, SINGULAR))
            )
            moving = ~(done | broken | ~exists | spent)
            settled = (length <= sizes.rounding(size, index))[moving]
            searched, step, merit = going[moving], step[moving], merit[moving]
            going = self.search(Z, F, rows, searched, step, merit, evaluations, status, limit)
            settled &= status[searched] == SINGULAR
            if settled.any():  # a root to rounding, from which nothing leads on
                found = searched[settled]
                steady = _is_steady(f, Z[found], rows[found], step[settled], F[found])
                status[found[steady]] = CONVERGED
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
        while t >= single.SMALLEST_STEP:
            trying = np.flatnonzero(~better & (evaluations[going] < limit))
            if not len(trying):
                break
            z = base[trying] + base.dtype.type(t) * step[trying]
            c = self.f.real(z, rows[going[trying]])
            evaluations[going[trying]] += 1
            good = decreases(_length(c), merit[trying], t)
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
