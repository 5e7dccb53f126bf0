"""Equations whose function is a Python function on NumPy arrays, solved and differentiated in Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from math import inf
from threading import RLock
from typing import Any

import numpy as np

from implicit_rnn.engines.base import LARGEST_CHANGE, Equation, SingularSolutionError
from implicit_rnn.engines.numpy import single
from implicit_rnn.engines.numpy.fixed_points import FixedPoint
from implicit_rnn.engines.numpy.functions import PythonFunction
from implicit_rnn.engines.numpy.operators import Operator, UnsolvedError, equilibration, is_isolated
from implicit_rnn.engines.numpy.roots import Root, newton_limit
from implicit_rnn.engines.numpy.solvers import AUTO_BLOCK, PATIENCE, Outcome, solve_each, transposed
from implicit_rnn.errors import ConvergenceError, EngineError, without_underflow
from implicit_rnn.solution import CONVERGED, Solution
from implicit_rnn.solvers import Anderson, Auto, Newton, Picard, Solver, tolerance

Array = np.ndarray

_FARTHER = 2**10
"""The factor by which an error is multiplied to tell a change of A, which grows with it, from rounding errors of A."""
_FORWARD = 64
"""The largest number of argument entries for each of which a system is solved if the transposed one cannot be."""
_PART = 2**24
"""The largest number of array entries for derivatives at a time."""


class PythonEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: Equation) -> None:
        self._equation = equation
        self._state = equation.start
        self._inverses: Array | None = None
        self._operators: dict[int, Operator] = {}
        self._differentiating = RLock()  # results for one derivative are kept for the next

    @cached_property
    def _f(self) -> PythonFunction:  # of which one problem of few unknowns needs nothing until it is differentiated
        return PythonFunction(self._equation)

    def solve(self, solver: Solver, out: Solution) -> None:
        equation, self._state, self._inverses = self._equation, out.state, None
        self._operators = {}
        if not isinstance(solver, (Auto, Newton) if equation.root else (Auto, Newton, Picard, Anderson)):
            raise EngineError(
                f"{solver.name} solves Julia code only; give f as irnn.julia(text), or use Newton() or Auto()"
            )
        tol = tolerance(solver.tol, equation.start.dtype)
        with np.errstate(all="ignore"):
            if found := _find_single(equation, tol, solver):
                out.state[0], out.iterations[0], out.residual[0], out.rate[0] = found
                out.status[0] = CONVERGED
                return
            outcome = Outcome.converged(1, equation.samples)
            if equation.root:
                out.state[...] = Root(self._f, tol, solver).run(outcome)
            else:
                out.state[...] = FixedPoint(self._f, tol, outcome).run(solver)[0][0]
            self._f.values.check_separate(out.state)
        outcome.write(out)

    @without_underflow()
    def vjp(self, v: Array) -> list[Array | None]:
        with self._differentiating:
            rows = np.flatnonzero(v.any(axis=1))
            if not self._f.is_large:
                return self._products(-np.einsum("bki,bk->bi", self._inverse(rows), v[rows]), rows)
            operators = _of_each(self._operator, rows)
            if all(operator.has_transpose for operator in operators):
                solutions = _of_each(lambda row: self._solved(self._operator(row), v[row], row, transposed=True), rows)
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
                for inputs, outputs, D in f.differences.derivatives(Z, own, index, certain=True):
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
                "transposed Jacobian of f, which its values do not tell: f couples too many unknowns, or turns NaN into numbers, "
                f"as np.where does (the dense Jacobian would take {equation.n**2 * 8 / 2**30:.2g} GiB): give vjp=, or jac= as a "
                "sparse matrix"
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

    @without_underflow()
    def jacobian(self, index: int, wanted: Array) -> Array:
        equation, f = self._equation, self._f
        J = np.full((equation.samples, equation.n, equation.entries(index)), np.nan, self._state.dtype)
        rows = np.flatnonzero(wanted)
        with self._differentiating:
            if f.is_large:
                for row, own in zip(rows, _of_each(lambda row: self._jacobian_of(row, index), rows), strict=True):
                    J[row] = own
                return J
            self._inverse(rows)
            for part in _parts(len(rows), equation.n * equation.entries(index)):
                own = rows[part]
                J[own] = -self._inverse(own) @ f.argument_jacobian(self._state[own], own, index)
        return J

    def _jacobian_of(self, row: int, index: int) -> Array:
        own, operator = np.array([row]), self._operator(row)
        B = self._f.argument_jacobian(self._state[own], own, index)[0]
        return -np.stack([self._solved(operator, column, row) for column in B.T], axis=-1)

    def _operator(self, row: int) -> Operator:
        """∂c/∂z at the solution of one sample with many unknowns, found once; ``SingularSolutionError`` as ``_inverse``."""
        if row not in self._operators:
            f, z, own = self._f, self._state[row], np.array([row])
            operator = f.operator(z, row, certain=True)
            δ = self._solved(operator, f.conditions_in_doubt(z[None], own)[0], row)

            def stays(error: Array) -> bool:
                return is_isolated(operator, f.operator((z - error).astype(z.dtype), row), error)

            try:
                if not (stays(δ) or stays(_FARTHER * δ)):
                    raise SingularSolutionError([row])
            except UnsolvedError:
                raise SingularSolutionError([row]) from None
            self._operators[row] = operator
        return self._operators[row]

    def _solved(self, operator: Operator, b: Array, row: int, transposed: bool = False) -> Array:
        try:
            return operator.solve(b, transposed)
        except UnsolvedError:
            if operator.matrix is not None:
                raise SingularSolutionError([row]) from None
            raise ConvergenceError(
                f"GMRES did not solve the linear system of {operator.n} unknowns at the solution, which has no derivative if the "
                "Jacobian of f is singular there; if it is not, give jac= as a sparse matrix, which is then factorised"
            ) from None

    def _inverse(self, rows: Array) -> Array:
        """A⁻¹ = (∂c/∂z)⁻¹ at the solution of the samples ``rows``, each found once.

        ``SingularSolutionError`` if A is singular to rounding, or changes so much within the error δ = A⁻¹c of the solution
        (with c at least the rounding error of the arguments) that the solution may not be isolated: ‖A(z)⁻¹A(z - δ) - I‖ > 1/4,
        and farther out; at a double root it is 1/2 (Newton and Kantorovich). The computation uses B, which is A with
        equilibrated rows and columns, so unknowns and conditions may have any unit.
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
            left, right = equilibration(np.where(finite[:, None, None], A, 1))
            B = np.where(finite[:, None, None], left * A * right, np.nan)
            scaled = solve_each(B, np.broadcast_to(identity, B.shape))
            singular = finite & ~(_column_sums(B) * _column_sums(scaled) * np.finfo(B.dtype).eps * n < 1)
            inverse = transposed(right) * scaled * transposed(left)
            if not singular.all():
                C = f.conditions_in_doubt(Z, new)
                δ = np.einsum("bij,bj->bi", inverse, C)
                beyond = Z - δ - np.copysign(8 * np.sqrt(np.finfo(Z.dtype).eps) * Z, δ)

                def changes(rows: Array, there: Array) -> tuple[Array, Array]:
                    J = f.conditions_jacobian(there, new[rows])
                    return J, ~(
                        _column_sums(scaled[rows] @ (left[rows] * J * right[rows]) - identity) <= LARGEST_CHANGE
                    )

                left_over = np.flatnonzero(finite & ~singular)
                J, changed = changes(left_over, beyond[left_over])
                answering = left_over[~changed]
                way, here = beyond[answering] - Z[answering], f.conditions(Z[answering], new[answering])
                # Displacements on which A changes may be lost in the rounding of f, as for cosh(z) - 1 near zero.
                while len(answering):
                    change = f.conditions(Z[answering] + way, new[answering]) - here
                    off = np.abs(np.einsum("bij,bj->bi", inverse[answering], change) - way)
                    short = (way != 0) & (np.abs(way) < 2 * off)
                    kept = short.any(axis=1) & ~singular[answering]
                    way = np.where(short, np.copysign(np.fmax(8 * np.abs(way), 2 * off), way), way)[kept]
                    answering, here = answering[kept], here[kept]
                    singular[answering] = changes(answering, Z[answering] + way)[1]
                left_over, J = left_over[changed], J[changed]
                if len(left_over):
                    rounding = f.rounding(Z[left_over], beyond[left_over], A[left_over], J, new[left_over])
                    C = C[left_over] + np.copysign(8 * rounding, C[left_over])
                    corrected = Z[left_over] - np.einsum("bij,bj->bi", inverse[left_over], C)
                    changed = changes(left_over, corrected)[1]
                    # Near to zero the derivative of x / expm1(x) is a rounding error, which vanishes farther out.
                    left_over, way = left_over[changed], (corrected - Z[left_over])[changed]
                    singular[left_over] = changes(left_over, Z[left_over] + _FARTHER * way)[1]
            if singular.any():
                raise SingularSolutionError(new[singular].tolist())
            self._inverses[new], self._known[new] = inverse, True
        return self._inverses[rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"equation": self._equation, "state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["equation"])  # type: ignore[misc]
        self._state = state["state"]


def _find_single(equation: Equation, tol: float, solver: Solver) -> single.Found | None:
    """The solution of one problem, or None if the methods for batches must find it, or report what is wrong."""
    if equation.samples > 1 or equation.n > single.MOST or equation.start.dtype != np.float64:
        return None
    limit = int(solver.max_iterations)
    with suppress(single.UncertainError):
        if equation.root:
            return single.newton(equation, tol, newton_limit(solver))
        if isinstance(solver, Auto):
            return single.picard(equation, tol, limit, AUTO_BLOCK, PATIENCE)
        if isinstance(solver, Picard) and solver.damping == 1:
            return single.picard(equation, tol, limit, limit, inf)
    return None


def _of_each(work: Callable[[int], Any], rows: Array) -> list[Any]:
    """``work`` of each sample; one ``SingularSolutionError`` names all that are singular."""
    results, singular = [], []
    for row in rows.tolist():
        try:
            results.append(work(row))
        except SingularSolutionError as error:
            singular += error.samples
    if singular:
        raise SingularSolutionError(singular)
    return results


def _parts(rows: int, numbers: int) -> list[slice]:
    """The samples in parts that take not too many numbers."""
    size = max(1, _PART // max(numbers, 1))
    return [slice(k, k + size) for k in range(0, rows, size)]


def _column_sums(A: Array) -> Array:
    """The largest column sum of each matrix."""
    return np.asarray(np.abs(A).sum(axis=1).max(axis=-1, initial=0))
