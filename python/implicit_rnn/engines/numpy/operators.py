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
SWEEPS = 12
"""Sweeps of ``equilibration``, each of which takes the root of what is left: enough for entries from 1e-300 to 1e300."""
_RESTARTS, _POWERS = 10, 100
"""Restarts of Arnoldi's method, and powers of J, after which the spectral radius is taken as it is."""


class UnsolvedError(ArithmeticError):
    """A system was not solved, since it is singular or GMRES does not converge."""


class Operator:
    """A = J - shift · I by products J d and, where they are known, vᵀJ; or by J as a sparse, or a dense, ``matrix``.

    All is done in double precision. Every solution is judged by its true residual: ``tol`` relative to the right side, which
    is ``product_tol`` for A itself if its products are not exact. ``make_matrix`` gives J, or None, where GMRES does not do.
    Where there is a matrix, its rows and columns are equilibrated.
    """

    def __init__(
        self,
        n: int,
        shift: int,
        product: Callable[[Array], Array],
        transposed: Callable[[Array], Array] | None,
        matrix: Any | None,
        make_matrix: Callable[[], Any | None],
        tol: float,
        product_tol: float,
    ) -> None:
        self.n, self.shift, self.tol, self.product_tol = n, shift, tol, product_tol
        self._product, self._transposed = product, transposed
        self.matrix, self._make_matrix = matrix, make_matrix
        self._solve_exactly: Callable[[Array, bool], Array] | None = None
        self._scales: tuple[Array, Array] | None = None

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
        assert self._transposed is not None
        return np.asarray(self._transposed(d), np.float64) - self.shift * d

    def solve(self, b: Array, transposed: bool = False) -> Array:
        """x with A x = b, or of Aᵀ, by GMRES and, where there is a matrix, LU; else ``UnsolvedError``."""
        b, tol = b.astype(np.float64), self.tol if transposed else self.product_tol
        if not np.isfinite(b).all():
            raise UnsolvedError
        if not b.any():
            return b
        if self._solve_exactly is None:
            left, right = self.scales[::-1] if transposed else self.scales

            def product(y: Array) -> Array:
                return left * self.product(right * y, transposed)

            y = _gmres(product, left * b, tol / 100)
            if np.linalg.norm(left * b - product(y)) <= tol * np.linalg.norm(left * b):
                return right * y
            if self.matrix is None:
                self.matrix = self._make_matrix()
            if self.matrix is None:
                raise UnsolvedError
            self._solve_exactly = self._factorise()
        return self._solve_exactly(b, transposed)

    @property
    def scales(self) -> tuple[Array, Array]:
        """Numbers by which the rows and the columns of A are multiplied, (n,) each; 1 where there is no matrix."""
        if self.matrix is None:
            return np.ones(self.n), np.ones(self.n)
        if self._scales is None:
            A = self._shifted()
            if isinstance(A, np.ndarray):
                left, right = equilibration(A[None])
                self._scales = left.ravel(), right.ravel()
            else:
                self._scales = _sparse_equilibration(A)
        return self._scales

    def _shifted(self) -> Any:
        """A as a matrix."""
        if isinstance(self.matrix, np.ndarray):
            return self.matrix - self.shift * np.eye(self.n)
        from scipy import sparse

        identity = sparse.identity(self.n, format="csc")
        return sparse.csc_matrix(sparse.csc_matrix(self.matrix, dtype=np.float64) - self.shift * identity)

    def _factorise(self) -> Callable[[Array, bool], Array]:
        """Solves with A or Aᵀ by LU; ``UnsolvedError`` if A is singular to rounding."""
        from scipy import linalg, sparse
        from scipy.sparse.linalg import LinearOperator, onenormest, splu

        scaled_solve: Callable[[Array, bool], Array]
        left, right = self.scales
        if isinstance(self.matrix, np.ndarray):
            B = left[:, None] * self._shifted() * right
            factors = linalg.lu_factor(B, check_finite=False)

            def scaled_solve(b: Array, transposed: bool) -> Array:
                return np.asarray(linalg.lu_solve(factors, b, int(transposed), check_finite=False))
        else:
            B = sparse.csc_matrix(sparse.diags(left) @ self._shifted() @ sparse.diags(right))
            try:
                lu = splu(B)
            except RuntimeError:  # singular
                raise UnsolvedError from None

            def scaled_solve(b: Array, transposed: bool) -> Array:
                return np.asarray(lu.solve(b, "T" if transposed else "N"))

        inverse = LinearOperator(
            B.shape, matvec=lambda b: scaled_solve(b, False), rmatvec=lambda b: scaled_solve(b, True), dtype=np.float64
        )
        with np.errstate(all="ignore"):
            condition = abs(B).sum(axis=0).max() * onenormest(inverse)
        if not condition * np.finfo(np.float64).eps * self.n < 1:
            raise UnsolvedError

        def solve(b: Array, transposed: bool) -> Array:
            return left * scaled_solve(right * b, True) if transposed else right * scaled_solve(left * b, False)

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
    _, right = here.scales
    size = np.linalg.norm(error / right)
    if size == 0:
        return True
    d = error / size
    change = here.solve(nearby.product(d) - here.product(d))
    return bool(np.linalg.norm(change / right) <= LARGEST_CHANGE)


def equilibration(A: Array) -> tuple[Array, Array]:
    """Powers of two by which the rows (B, n, 1) and columns (B, 1, n) of A (B, n, n) have largest entries of about 1.

    Source: D. Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034.
    """
    exponents = _exponents(A)

    def largest(left: Array, right: Array) -> tuple[Array, Array]:
        scaled = exponents + left + right
        return scaled.max(axis=-1, keepdims=True), scaled.max(axis=-2, keepdims=True)

    return _balanced(largest, (*A.shape[:-1], 1), (*A.shape[:-2], 1, A.shape[-1]), A.dtype)


def _sparse_equilibration(A: Any) -> tuple[Array, Array]:
    """``equilibration`` of one sparse matrix; (n,) each."""
    entries = A.tocoo()
    exponents = _exponents(entries.data)

    def largest(left: Array, right: Array) -> tuple[Array, Array]:
        scaled = exponents + left[entries.row] + right[entries.col]
        of_rows, of_columns = np.full_like(left, -np.inf), np.full_like(right, -np.inf)
        np.maximum.at(of_rows, entries.row, scaled)
        np.maximum.at(of_columns, entries.col, scaled)
        return of_rows, of_columns

    return _balanced(largest, A.shape[:1], A.shape[1:], A.dtype)


def _balanced(
    largest: Callable[[Array, Array], tuple[Array, Array]],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    dtype: np.dtype,
) -> tuple[Array, Array]:
    """The scales of rows and columns, given the exponents of the largest entries of each for exponents of the scales."""
    left, right = np.zeros(rows), np.zeros(columns)
    for _ in range(SWEEPS):
        of_rows, of_columns = (np.where(np.isfinite(x), x, 0) for x in largest(left, right))
        if max(np.abs(of_rows).max(initial=0), np.abs(of_columns).max(initial=0)) <= 2:
            break
        left, right = left - of_rows / 2, right - of_columns / 2
    limits = np.finfo(dtype)
    left, right = (np.exp2(np.clip(np.rint(x), limits.minexp, limits.maxexp - 1)).astype(dtype) for x in (left, right))
    return left, right


def _exponents(A: Array) -> Array:
    return np.where(A == 0, -np.inf, np.frexp(A)[1])
