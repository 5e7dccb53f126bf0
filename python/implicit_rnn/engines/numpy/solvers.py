"""The forward solvers on many samples of one or more nets at once; samples that are done leave the arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np

from implicit_rnn.solution import Status
from implicit_rnn.solvers import Anderson, Auto, Newton, Picard, Solver

Array = np.ndarray
Elementwise = Callable[[Array], Array]

SUPPORTED = (Auto, Picard, Anderson, Newton)

# Plain numbers: the members of an IntEnum are slow to look up in a loop.
_CONVERGED, _MAX_ITERATIONS, _DIVERGED, _NON_FINITE, _UNSTABLE, _SINGULAR = (int(status) for status in Status)

_BLOW_UP = 1e6
_BLOCK = 8
_PATIENCE = 16
_DENSE = 64
_SMALL = 16
_SMALLEST_STEP = 2.0**-6


@dataclass
class Outcome:
    """How the solve of each sample of each net ended, all (S, B); stages are merged: the worst of each."""

    status: Array
    iterations: Array
    residual: Array
    rate: Array

    @classmethod
    def converged(cls, nets: int, samples: int) -> Outcome:
        """All converged after no iteration."""
        shape = (nets, samples)
        return cls(np.zeros(shape, np.int8), np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape))

    def merge(self, rows: Array, status: Array, iterations: Array, residual: Array, rate: Array) -> None:
        """Merge values for the flat indices ``rows`` of (S, B)."""
        for merged, values in zip(
            (self.status, self.iterations, self.residual, self.rate), (status, iterations, residual, rate), strict=True
        ):
            flat = merged.reshape(-1)
            flat[rows] = np.maximum(flat[rows], values)


@dataclass
class Equation:
    """z = f(u + R z) for one stage of n neurons."""

    R: Array
    """(S, n, n)"""
    f: Elementwise
    slope: Callable[[Array, Array], Array]
    """f′ from s and z = f(s)"""
    tol: float
    check_stability: bool


@dataclass
class _Rows:
    """The samples still at work, one row each, at the flat index ``index`` of (S, B); R per row if there are many nets."""

    U: Array
    Z: Array
    index: Array
    S: Array
    F: Array
    residual: Array
    iterations: Array
    R: Array | None = field(default=None)

    def take(self, mask: Array) -> _Rows:
        """The rows of a boolean mask."""
        kept = np.flatnonzero(mask)
        return _Rows(
            self.U[kept],
            self.Z[kept],
            self.index[kept],
            self.S[kept],
            self.F[kept],
            self.residual[kept],
            self.iterations[kept],
            None if self.R is None else self.R[kept],
        )


def solve(solver: Solver, equation: Equation, U: Array, Z0: Array, outcome: Outcome) -> tuple[Array, Array]:
    """The equilibria Z and their arguments S (S, B, n) for the drive U (S, B, n), from Z0; merges into ``outcome``."""
    return _Solve(equation, U, Z0, outcome).run(solver)


class _Solve:
    def __init__(self, equation: Equation, U: Array, Z0: Array, outcome: Outcome) -> None:
        self.equation = equation
        self.outcome = outcome
        nets, samples, n = U.shape
        self.shape = U.shape
        self.floor = 1e-3 * np.sqrt(n)
        self.Z = np.empty((nets * samples, n), U.dtype)
        self.S = np.empty_like(self.Z)
        rows = nets * samples
        z = Z0.reshape(rows, n).copy()
        self.rows = _Rows(U.reshape(rows, n), z, np.arange(rows), z, z, np.full(rows, np.inf), np.zeros(rows, np.int32))
        self.rate = np.zeros(rows)
        if nets > 1:
            self.rows.R = np.repeat(equation.R, samples, axis=0)

    def run(self, solver: Solver) -> tuple[Array, Array]:
        limit = solver.max_iterations  # type: ignore[attr-defined]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if isinstance(solver, Picard):
                self.picard(limit, solver.damping)
            elif isinstance(solver, Anderson):
                self.anderson(solver, limit)
            elif isinstance(solver, Newton):
                self.newton(limit)
            else:
                self.auto(limit)
        rows = self.rows
        if len(rows.index):
            self.finish(
                rows,
                np.full(len(rows.index), _MAX_ITERATIONS),
                rows.residual / self.scale(rows),
                self.rate,
            )
        return self.Z.reshape(self.shape), self.S.reshape(self.shape)

    # --- one evaluation ----------------------------------------------------------------------------------

    def product(self, rows: _Rows, V: Array) -> Array:
        """R v for each row."""
        if rows.R is None:
            return V @ self.equation.R[0].T
        return np.matmul(rows.R, V[..., None])[..., 0]

    def scale(self, rows: _Rows) -> Array:
        return np.maximum(norm(rows.F), self.floor)

    def evaluate(self, *extra: Array, steps: int = 1) -> tuple[Array, ...]:
        """Evaluate f at all rows and take out those that are done; returns ``extra`` (rows first) without them.

        ``steps`` counts the evaluations since the last call, this one included.
        """
        rows, equation = self.rows, self.equation
        rows.S = self.product(rows, rows.Z) + rows.U
        rows.F = equation.f(rows.S)
        residual = norm(rows.F - rows.Z)
        scale = self.scale(rows)
        rate = np.where(np.isfinite(rows.residual), (residual / rows.residual) ** (1 / steps), 0)
        rows.residual, rows.iterations = residual, rows.iterations + steps
        self.rate = rate
        broken = ~np.isfinite(residual)
        done = ~broken & (residual <= equation.tol * scale)
        lost = broken | (residual > _BLOW_UP * (1 + self.floor))
        if self.rescued is not None and lost.any():
            rescued = rows.take(lost)
            rescued.Z, rescued.residual = np.zeros_like(rescued.Z), np.full_like(rescued.residual, np.inf)
            self.rescued.append(rescued)
            ended = done
        else:
            ended, lost = done | lost, np.zeros_like(lost)
        if not (ended | lost).any():
            return extra
        status = np.where(done, _CONVERGED, np.where(broken, _NON_FINITE, _DIVERGED))
        self.finish(rows.take(ended), status[ended], (residual / scale)[ended], rate[ended])
        left = ~(ended | lost)
        self.rows = rows.take(left)
        self.rate = rate[left]
        return tuple(array[left] for array in extra)

    def finish(self, rows: _Rows, status: Array, residual: Array, rate: Array) -> None:
        self.Z[rows.index] = rows.Z  # the iterate whose residual is known, and the last finite one
        self.S[rows.index] = rows.S
        if self.stability_in_question:
            found = status == _CONVERGED
            status[found] = np.where(self.repels(rows.take(found)), _UNSTABLE, _CONVERGED)
        self.outcome.merge(rows.index, status, rows.iterations, residual, rate)

    # --- methods -----------------------------------------------------------------------------------------

    stability_in_question = False
    """Whether the method at work may find equilibria that do not attract."""
    rescued: list[_Rows] | None = None
    """Rows that blew up, to start again from zero by another method; None ends them."""

    def picard(self, limit: int, damping: float = 1.0) -> None:
        # The overhead of a look at the residual exceeds a few evaluations of a small f.
        steps = 4 if self.shape[-1] <= _SMALL else 1
        first = 0
        while first < limit:
            # Undamped iteration ends at what attracts it, unless it starts there.
            self.stability_in_question = self.equation.check_stability and (first == 0 or damping < 1)
            count = 1 if first == 0 else min(steps, limit - first)
            first += count
            for _ in range(count - 1):
                rows = self.rows
                self.advance(rows, self.equation.f(self.product(rows, rows.Z) + rows.U), damping)
            self.evaluate(steps=count)
            if not len(self.rows.index):
                return
            self.advance(self.rows, self.rows.F, damping)

    def advance(self, rows: _Rows, F: Array, damping: float) -> None:
        rows.Z = F if damping == 1 else rows.Z + rows.Z.dtype.type(damping) * (F - rows.Z)

    def anderson(self, solver: Anderson, limit: int) -> None:
        self.stability_in_question = self.equation.check_stability
        m, n = solver.memory, self.shape[-1]
        dtype = self.rows.Z.dtype
        ridge = max(solver.ridge, float(np.finfo(dtype).eps))
        count = len(self.rows.index)
        dR, dF = (np.zeros((count, m, n), dtype) for _ in range(2))
        last_r, last_F = (np.zeros((count, n), dtype) for _ in range(2))
        last_residual, held = np.full(count, np.inf), np.zeros(count, np.int64)
        for k in range(limit):
            dR, dF, last_r, last_F, last_residual, held = self.evaluate(dR, dF, last_r, last_F, last_residual, held)
            rows = self.rows
            if not len(rows.index):
                return
            r = rows.F - rows.Z
            if k > 0:
                place = (k - 1) % m
                dR[:, place], dF[:, place] = r - last_r, rows.F - last_F
                restart = rows.residual > 2 * last_residual
                dR[restart], dF[restart] = 0, 0
                held = np.where(restart, 0, np.minimum(held + 1, m))
            last_r, last_F, last_residual = r, rows.F, rows.residual
            G = dR @ np.swapaxes(dR, 1, 2)
            trace = np.trace(G, axis1=1, axis2=2)[:, None, None]
            G = G + (ridge * trace + np.where(trace > 0, 0, 1)) * np.eye(m, dtype=dtype)
            # Empty places have zero rows; a unit diagonal gives them zero weight.
            empty = np.diagonal(G, axis1=1, axis2=2) <= ridge * trace[:, :, 0] * (1 + 1e-3)
            G[:, range(m), range(m)] += empty * trace[:, :, 0]
            γ = solve_each(G, dR @ r[..., None])
            β = dtype.type(solver.damping)
            step = np.swapaxes(dF - (1 - β) * dR, 1, 2) @ γ
            rows.Z = rows.F - (1 - β) * r - step[..., 0]

    def newton(self, limit: int) -> None:
        self.stability_in_question = self.equation.check_stability
        count, n = self.rows.Z.shape
        dtype = self.rows.Z.dtype
        base, direction, picard = (np.zeros((count, n), dtype) for _ in range(3))
        t, at_base = np.zeros(count, dtype), np.full(count, np.inf)
        for _ in range(limit):
            base, direction, picard, t, at_base = self.evaluate(base, direction, picard, t, at_base)
            rows = self.rows
            if not len(rows.index):
                break
            worse = (t > 0) & ~(rows.residual < (1 - 1e-4 * t) * at_base)
            t = np.where(worse, t / 2, 1).astype(dtype)
            fresh = ~worse
            base[fresh], picard[fresh], at_base[fresh] = rows.Z[fresh], rows.F[fresh], rows.residual[fresh]
            if fresh.any():
                direction[fresh] = self.newton_direction(rows.take(fresh))
            rows.Z = base + t[:, None] * direction
            exhausted = t < _SMALLEST_STEP
            rows.Z[exhausted] = picard[exhausted]
            t[exhausted] = 0
            rows.residual = at_base

    def newton_direction(self, rows: _Rows) -> Array:
        """(I - D R)⁻¹ (F - Z); the Picard step F - Z where that fails."""
        r = rows.F - rows.Z
        A = np.eye(r.shape[1], dtype=r.dtype) - self.jacobian(rows)
        step = solve_each(A, r[..., None])[..., 0]
        return np.where(np.isfinite(step), step, r)

    def jacobian(self, rows: _Rows) -> Array:
        """D R for each row (rows, n, n)."""
        R = self.equation.R[:1] if rows.R is None else rows.R
        return np.asarray(self.equation.slope(rows.S, rows.F)[..., None] * R)

    def repels(self, rows: _Rows) -> Array:
        """Whether the spectral radius of the Jacobian is 1 or more; a norm below 1 spares the eigenvalues."""
        J = self.jacobian(rows)
        repels = np.abs(J).sum(axis=1).max(axis=-1, initial=0) >= 1
        if repels.any():
            repels[repels] = np.abs(np.linalg.eigvals(J[repels])).max(axis=-1) >= 1
        return np.asarray(repels)

    def auto(self, limit: int) -> None:
        """Picard iteration while it is fast, Newton's method or Anderson acceleration for the samples that are slow."""
        n = self.shape[-1]
        patience = _PATIENCE * (8 if self.equation.check_stability else 1)
        slow: list[_Rows] = []
        self.rescued = slow
        used = 0
        while used < limit and len(self.rows.index):
            self.picard(min(_BLOCK, limit - used))
            used += _BLOCK
            rows = self.rows
            if not len(rows.index):
                break
            goal = self.equation.tol * self.scale(rows)
            predicted = np.log(goal / rows.residual) / np.log(np.minimum(self.rate, 0.9999))
            keep = ~(predicted > patience)
            slow.append(rows.take(~keep))
            self.rows = rows.take(keep)
            self.rate = self.rate[keep]
        self.rescued = None
        self.rows = _join([*slow, self.rows])
        self.rate = np.zeros(len(self.rows.index))
        left = limit - _BLOCK
        if n > _DENSE and len(self.rows.index):
            self.anderson(Anderson(), min(60, left))
            left -= 60
        if len(self.rows.index):
            self.newton(min(100, left))


def _join(parts: list[_Rows]) -> _Rows:
    def joined(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in parts])

    return _Rows(
        *(joined(f.name) for f in fields(_Rows) if f.name != "R"),  # type: ignore[misc]
        R=None if parts[0].R is None else joined("R"),
    )


def solve_each(A: Array, b: Array) -> Array:
    """x with A x = b for a stack of systems (..., n, n) and (..., n, 1); NaN for a singular one, which harms no other."""
    try:
        return np.linalg.solve(A, b)
    except np.linalg.LinAlgError:
        x = np.full_like(b, np.nan)
        for place in np.ndindex(A.shape[:-2]):
            with contextlib.suppress(np.linalg.LinAlgError):
                x[place] = np.linalg.solve(A[place], b[place])
        return x


def norm(A: Array) -> Array:
    """Euclidean norm over the last axis."""
    return np.asarray(np.sqrt(np.einsum("...i,...i->...", A, A)))
