"""Linear systems of one sample with so many unknowns that a dense matrix would take the memory, or the time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from implicit_rnn.engines.base import LARGEST_CHANGE

Array = np.ndarray

_KRYLOV, _CYCLES = 50, 4
"""Vectors that GMRES keeps, and how often it begins anew."""
_RESTARTS, _POWERS = 10, 100
"""Restarts of Arnoldi's method, and powers of J, after which the spectral radius is taken as it is."""


class UnsolvedError(ArithmeticError):
    """A system was not solved, since it is singular or GMRES does not converge."""


class TransposeError(ArithmeticError):
    """Products with the transposed matrix are not to be had."""


class Operator:
    """A = J - shift · I by products J d and, where they are known, vᵀJ; or by J as a sparse, or a dense, ``matrix``.

    All is done in double precision. Every solution is judged by its true residual: ``tol`` relative to the right side, which
    is ``product_tol`` for A itself if its products are not exact. ``make_matrix`` gives J where GMRES does not do.
    """

    def __init__(
        self,
        n: int,
        shift: int,
        product: Callable[[Array], Array],
        transposed: Callable[[Array], Array] | None,
        matrix: Any | None,
        make_matrix: Callable[[], Array] | None,
        tol: float,
        product_tol: float,
    ) -> None:
        self.n, self.shift, self.tol, self.product_tol = n, shift, tol, product_tol
        self._product, self._transposed = product, transposed
        self.matrix, self._make_matrix = matrix, make_matrix
        self._solve_exactly: Callable[[Array, bool], Array] | None = None

    @property
    def has_transpose(self) -> bool:
        """Whether ``solve(b, transposed=True)`` is possible."""
        return self.matrix is not None or self._transposed is not None

    def jacobian_product(self, d: Array) -> Array:
        """J d."""
        return np.asarray(self._product(d) if self.matrix is None else self.matrix @ d, np.float64)

    def product(self, d: Array, transposed: bool = False) -> Array:
        """A d, or Aᵀ d."""
        if not transposed:
            return self.jacobian_product(d) - self.shift * d
        if self.matrix is not None:
            return self.matrix.T @ d - self.shift * d
        if self._transposed is None:
            raise TransposeError
        return np.asarray(self._transposed(d), np.float64) - self.shift * d

    def solve(self, b: Array, transposed: bool = False) -> Array:
        """x with A x = b, or of Aᵀ, by GMRES and, where there is a matrix, LU; else ``UnsolvedError``."""
        b, tol = b.astype(np.float64), self.tol if transposed else self.product_tol
        size = np.linalg.norm(b)
        if not np.isfinite(size):
            raise UnsolvedError
        if size == 0:
            return b

        def residual(x: Array) -> float:
            return float(np.linalg.norm(b - self.product(x, transposed)))

        if self._solve_exactly is None:
            x = _gmres(lambda d: self.product(d, transposed), b, tol / 100)
            if residual(x) <= tol * size:
                return x
            if self.matrix is None and self._make_matrix is not None:
                self.matrix = self._make_matrix()
            if self.matrix is None:
                raise UnsolvedError
            self._solve_exactly = self._factorise()
        return self._solve_exactly(b, transposed)

    def _factorise(self) -> Callable[[Array, bool], Array]:
        """Solves with A or Aᵀ by LU; ``UnsolvedError`` if A is singular to rounding."""
        from scipy import linalg, sparse
        from scipy.sparse.linalg import LinearOperator, onenormest, splu

        solve: Callable[[Array, bool], Array]
        if isinstance(self.matrix, np.ndarray):
            A = self.matrix - self.shift * np.eye(self.n)
            factors = linalg.lu_factor(A, check_finite=False)

            def solve(b: Array, transposed: bool) -> Array:
                return np.asarray(linalg.lu_solve(factors, b, int(transposed), check_finite=False))
        else:
            identity = sparse.identity(self.n, format="csc")
            A = sparse.csc_matrix(sparse.csc_matrix(self.matrix, dtype=np.float64) - self.shift * identity)
            try:
                lu = splu(A)
            except RuntimeError:  # singular
                raise UnsolvedError from None

            def solve(b: Array, transposed: bool) -> Array:
                return np.asarray(lu.solve(b, "T" if transposed else "N"))

        inverse = LinearOperator(
            (self.n, self.n), matvec=lambda b: solve(b, False), rmatvec=lambda b: solve(b, True), dtype=np.float64
        )
        with np.errstate(all="ignore"):
            condition = abs(A).sum(axis=0).max() * onenormest(inverse)
        if not condition * np.finfo(np.float64).eps * self.n < 1:
            raise UnsolvedError
        return solve

    def repels(self) -> bool:
        """Whether the spectral radius of J is 1 or more, as far as Arnoldi's method sees it."""
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigs

        if self.matrix is not None and min(abs(self.matrix).sum(axis=axis).max() for axis in (0, 1)) < 1:
            return False
        J = LinearOperator((self.n, self.n), matvec=lambda d: self.jacobian_product(d.reshape(-1)), dtype=np.float64)
        start, values = np.random.default_rng(0).standard_normal(self.n), np.empty(0)
        try:
            values = eigs(J, 1, which="LM", v0=start, tol=1e-4, maxiter=_RESTARTS, return_eigenvectors=False)
        except ArpackError as error:
            values = getattr(error, "eigenvalues", values)  # those that were found
        if len(values):
            return bool(np.abs(values).max() >= 1)
        d, growth = start, []  # eigenvalues of equal size, or none that is not 0
        for _ in range(_POWERS):
            d = self.jacobian_product(d / np.linalg.norm(d))
            growth.append(np.linalg.norm(d))
            if growth[-1] == 0:
                return False
        return bool(np.exp(np.log(growth[_POWERS // 2 :]).mean()) >= 1)


def _gmres(product: Callable[[Array], Array], b: Array, tol: float) -> Array:
    from scipy.sparse.linalg import LinearOperator, gmres

    n = len(b)
    A = LinearOperator((n, n), matvec=lambda d: product(np.asarray(d).reshape(-1)), dtype=np.float64)
    relative = "rtol" if "rtol" in inspect.signature(gmres).parameters else "tol"  # as SciPy before 1.12 names it
    with np.errstate(all="ignore"):
        return np.asarray(gmres(A, b, restart=min(_KRYLOV, n), maxiter=_CYCLES, atol=0.0, **{relative: tol})[0])


def is_isolated(here: Operator, nearby: Operator, error: Array) -> bool:
    """Whether A changes little along the error of a solution, from ``here`` to where the error takes it, ``nearby``."""
    size = np.linalg.norm(error)
    if size == 0:
        return True
    d = error / size
    change = here.solve(nearby.product(d) - here.product(d))
    return bool(np.linalg.norm(change) <= LARGEST_CHANGE)
