"""The forward solvers on many samples of one or more nets at once; finished samples leave the arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from implicit_rnn.norms import norm
from implicit_rnn.solution import CONVERGED, DIVERGED, MAX_ITERATIONS, NON_FINITE, SINGULAR, UNSTABLE, Solution
from implicit_rnn.solvers import Anderson, Auto, Newton, Picard, Solver

Array = np.ndarray
Elementwise = Callable[[Array], Array]

BLOW_UP = 1e6
"""The growth of the residual since the start that counts as divergence."""
AUTO_BLOCK = 8
"""Picard steps that Auto takes before it sets slow samples aside."""
PATIENCE = 128
"""Further Picard steps that Auto allows a sample; a quarter of it if the equilibrium is unique and the next method faster."""
_LEAST = float(np.finfo(np.float64).tiny)
_SQUARINGS = 10
_TINY, _DENSE = 8, 64
SMALLEST_STEP = 2.0**-6
_ANDERSON_STEPS, _NEWTON_STEPS, _LAST_STEPS = 60, 100, 256
"""Evaluations of a sample by the later methods of Auto."""


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

    def flat(self) -> list[Array]:
        """Status, iterations, residuals and rates, (S B,)."""
        return [values.reshape(-1) for values in (self.status, self.iterations, self.residual, self.rate)]

    def merge(self, rows: Array, status: Array, iterations: Array, residual: Array, rate: Array) -> None:
        """Merge values for the flat indices ``rows`` of (S, B)."""
        for merged, values in zip(self.flat(), (status, iterations, residual, rate), strict=True):
            merged[rows] = np.maximum(merged[rows], values)

    def write(self, out: Solution) -> None:
        """Write how the samples of the one net ended to its solution."""
        for name in ("status", "iterations", "residual", "rate"):
            getattr(out, name)[...] = getattr(self, name)[0]


@dataclass
class StageEquation:
    """z = f(u + R z) for one stage of n neurons, and the tolerance of its solution."""

    R: Array
    """(S, n, n)"""
    f: Elementwise
    slope: Callable[[Array, Array], Array]
    """f′ from s and z = f(s)"""
    tol: float
    check_stability: bool


@dataclass
class Rows:
    """The unfinished samples, one row each, at the flat index ``index`` of (S, B); R per row if there are many nets."""

    U: Array
    Z: Array
    index: Array
    S: Array
    F: Array
    residual: Array
    iterations: Array
    R: Array | None = field(default=None)

    def take(self, mask: Array) -> Rows:
        """The rows of a boolean mask."""
        kept = np.flatnonzero(mask)
        if len(kept) == len(mask):
            return self
        return Rows(
            self.U.take(kept, 0),
            self.Z.take(kept, 0),
            self.index.take(kept),
            self.S.take(kept, 0),
            self.F.take(kept, 0),
            self.residual.take(kept),
            self.iterations.take(kept),
            None if self.R is None else self.R.take(kept, 0),
        )


class Solve:
    """One solve of an equation for the drive U (S, B, n), from Z0: the rows still at work, and where those that are done are
    written.
    """

    def __init__(self, equation: StageEquation, U: Array, Z0: Array, outcome: Outcome) -> None:
        self.equation = equation
        self.outcome = outcome
        nets, samples, n = U.shape
        self.shape = U.shape
        self.floor = 1e-3 * np.sqrt(n)
        self.Z = np.empty((nets * samples, n), U.dtype)
        self.S, self.F = np.empty_like(self.Z), np.empty_like(self.Z)
        rows = nets * samples
        z = Z0.reshape(rows, n).copy()
        self.rows = Rows(U.reshape(rows, n), z, np.arange(rows), z, z, np.full(rows, np.inf), np.zeros(rows, np.int32))
        self.rate = np.zeros(rows)
        self.limit = np.zeros(rows, np.int32)
        self.singular = np.zeros(rows, bool)
        self.Rt = np.ascontiguousarray(equation.R[0].T)  # by which few samples multiply faster
        if nets > 1:
            self.rows.R = np.repeat(equation.R, samples, axis=0)

    def run(self, solver: Solver) -> tuple[Array, Array, Array]:
        """The equilibria Z, their arguments S = u + R Z and f(S), all (S, B, n).

        Merges into ``outcome``. f is evaluated at most ``solver.max_iterations`` times for each sample.
        """
        self.limit[...] = solver.max_iterations
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            METHODS[type(solver)](self, solver)
        return self.Z.reshape(self.shape), self.S.reshape(self.shape), self.F.reshape(self.shape)

    # --- one evaluation ----------------------------------------------------------------------------------

    def product(self, rows: Rows, V: Array) -> Array:
        """R v for each row."""
        if rows.R is None:
            return V @ self.Rt
        return np.matmul(rows.R, V[..., None])[..., 0]

    def scale(self, rows: Rows) -> Array:
        return np.maximum(norm(rows.F), self.floor)

    def evaluate(self, *extra: Array, steps: int = 1) -> tuple[Array, ...]:
        """Evaluate f at all rows and remove those that are done; returns ``extra`` (rows first) without them.

        ``steps`` counts the evaluations since the last call, this one included; rows that have used all of theirs are done.
        """
        rows, equation = self.rows, self.equation
        rows.S = self.product(rows, rows.Z) + rows.U
        rows.F = equation.f(rows.S)
        residual = self.size(rows.F - rows.Z)
        scale = self.scale(rows)
        self.rate = rate = (residual / rows.residual) ** (1 / steps)  # 0 at the first look
        rows.residual, rows.iterations = residual, rows.iterations + steps
        spent = rows.iterations >= self.limit[rows.index]
        largest, near = self.largest(rows), self.settle(rows, scale, spent) & (residual < np.inf)
        going = residual <= largest if self.trial is None else (residual <= largest) | self.trial
        left = going & ~(near | spent)
        if left.all():
            return extra
        status = np.zeros(len(residual), np.int8)
        ended, failed = ~left, ~(left | near)
        if failed.any():
            broken = ~np.isfinite(residual)
            diverged = broken | (residual > largest)
            status[failed] = np.where(self.singular[rows.index], SINGULAR, MAX_ITERATIONS)[failed]
            status[diverged] = np.where(broken, NON_FINITE, DIVERGED)[diverged]
            if self.rescued is not None and (rescued := diverged & ~spent).any():
                again = replace(rows.take(rescued))
                again.Z, again.residual = self.restart(again), np.full_like(again.residual, np.inf)
                self.rescued.append(again)
                ended &= ~rescued
        relative = np.where(residual == 0, 0, residual / scale)  # the scale of a fixed point at zero is zero, too
        self.finish(rows.take(ended), status[ended], relative[ended], rate[ended])
        self.rows = rows.take(left)
        self.rate = rate[left]
        return tuple(array[left] for array in extra)

    def accept(self, rows: Rows) -> None:
        """Record the iterates of ``rows``, from which a method continues; trial steps that it takes back do not count."""

    def forget(self, rows: Rows) -> None:
        """Forget the recorded iterates of ``rows``, which start again."""

    def restart(self, rows: Rows) -> Array:
        """The restart of rows that diverged."""
        return np.zeros_like(rows.Z)

    def size(self, V: Array) -> Array:
        """Of vectors, one a row."""
        return norm(V)

    def settle(self, rows: Rows, scale: Array, spent: Array) -> Array:
        """Which rows have converged, by their residual; ``spent`` are those without evaluations left."""
        return np.asarray(rows.residual <= self.equation.tol * scale)

    def largest(self, rows: Rows) -> Array | float:
        """The residual above which a row has diverged, in units of 1 and of u: that of a large u is large, too, on its way."""
        usual = float(BLOW_UP * (1 + self.floor))
        return np.maximum(usual, BLOW_UP * norm(rows.U)) if (rows.residual > usual).any() else usual

    def finish(self, rows: Rows, status: Array, residual: Array, rate: Array) -> None:
        self.Z[rows.index] = rows.Z  # the iterate whose residual is known, and the last finite one
        self.S[rows.index] = rows.S
        self.F[rows.index] = rows.F
        if self.stability_in_question:
            found = status == CONVERGED
            judged = rows.take(found)
            located = np.where(self.are_located(judged), CONVERGED, SINGULAR)
            status[found] = np.where(self.repels(judged), UNSTABLE, located)
        self.outcome.merge(rows.index, status, rows.iterations, residual, rate)

    # --- methods -----------------------------------------------------------------------------------------

    stability_in_question = False
    """Whether the current method may find equilibria that do not attract."""
    trial: Array | None = None
    """Which rows are at a trial step, which is shortened if it leads too far; None for methods without trial steps."""
    rescued: list[Rows] | None = None
    """Rows that diverged, to be restarted from zero with another method; None if they end instead."""

    def picard(self, limit: int, damping: float = 1.0, slow: list[Rows] | None = None) -> None:
        """``limit`` evaluations of all rows, which have had equally many; those that are going to need many more join ``slow``,
        if that is given.
        """
        first, at_start = 0, not self.rows.iterations.any()
        # Newton's method is fast for a few neurons, and Anderson acceleration follows for many.
        patience = PATIENCE if self.equation.check_stability or _TINY < self.shape[-1] <= _DENSE else PATIENCE // 4
        while first < limit:
            # Undamped iteration ends at what attracts it, unless it starts there.
            self.stability_in_question = self.equation.check_stability and (at_start or damping < 1)
            count = 1 if at_start and self.equation.check_stability else min(self.until_check(first), limit - first)
            at_start = False
            first += count
            for _ in range(count - 1):
                rows = self.rows
                self.advance(rows, self.equation.f(self.product(rows, rows.Z) + rows.U), damping)
            self.evaluate(steps=count)
            if not len(self.rows.index):
                return
            self.accept(self.rows)
            self.advance(self.rows, self.rows.F, damping)
            if slow is not None and first >= AUTO_BLOCK:
                goal = self.equation.tol * self.scale(self.rows)
                predicted = np.log(goal / self.rows.residual) / np.minimum(np.log(self.rate), -_LEAST)
                if (late := predicted > patience).any():
                    slow.append(self.rows.take(late))
                    self.rows = self.rows.take(~late)
                    if not len(self.rows.index):
                        return

    def until_check(self, first: int) -> int:
        """Evaluations from the ``first`` on to the next check of the residuals, which takes longer than a few of a small f.

        It does not depend on the other samples, on which no result may depend.
        """
        return max(8, first // 3) if self.shape[-1] <= _DENSE else 2

    def advance(self, rows: Rows, F: Array, damping: float) -> None:
        rows.Z = F if damping == 1 else rows.Z + rows.Z.dtype.type(damping) * (F - rows.Z)

    def anderson(self, solver: Anderson, limit: int) -> None:
        """Up to ``limit`` evaluations; r is in units of about the first residual, so that squares neither overflow nor vanish."""
        self.stability_in_question = self.equation.check_stability
        m, n = solver.memory, self.shape[-1]
        dtype = self.rows.Z.dtype
        ridge = max(solver.ridge, float(np.finfo(dtype).eps))
        count = len(self.rows.index)
        dR, dF = (np.zeros((count, m, n), dtype) for _ in range(2))
        last_r, last_F = (np.zeros((count, n), dtype) for _ in range(2))
        last_residual, unit = np.full(count, np.inf), np.zeros((count, 1), dtype)
        for k in range(limit):
            dR, dF, last_r, last_F, last_residual, unit = self.evaluate(dR, dF, last_r, last_F, last_residual, unit)
            rows = self.rows
            if not len(rows.index):
                return
            self.accept(rows)
            if k == 0:
                unit = np.ldexp(dtype.type(1), np.frexp(rows.residual)[1])[:, None]
            r = (rows.F - rows.Z) / unit
            if k > 0:
                place = (k - 1) % m
                dR[:, place], dF[:, place] = r - last_r, rows.F - last_F
                restart = rows.residual > 2 * last_residual
                dR[restart], dF[restart] = 0, 0
            last_r, last_F, last_residual = r, rows.F, rows.residual
            G = dR @ np.swapaxes(dR, 1, 2)
            trace = np.trace(G, axis1=1, axis2=2)[:, None, None]
            G = G + (ridge * trace + ~(trace > 0)) * np.eye(m, dtype=dtype)
            # Empty places have zero rows; a unit diagonal gives them zero weight.
            empty = np.diagonal(G, axis1=1, axis2=2) <= ridge * trace[:, :, 0] * (1 + 1e-3)
            G[:, range(m), range(m)] += empty * trace[:, :, 0]
            γ = solve_each(G, dR @ r[..., None])
            β = dtype.type(solver.damping)
            step = np.swapaxes(dF - (1 - β) * unit[..., None] * dR, 1, 2) @ γ
            rows.Z = rows.F - (1 - β) * unit * r - step[..., 0]

    def newton(self) -> None:
        """Until no row is left. The step is halved while ‖r‖ does not decrease; where that does not help, a Picard step."""
        self.stability_in_question = self.equation.check_stability
        count, n = self.rows.Z.shape
        dtype = self.rows.Z.dtype
        base, direction, picard = (np.zeros((count, n), dtype) for _ in range(3))
        t, at_base = np.zeros(count, dtype), np.full(count, np.inf)
        while True:
            self.trial = t > 0
            base, direction, picard, t, at_base = self.evaluate(base, direction, picard, t, at_base)
            rows = self.rows
            if not len(rows.index):
                return
            worse = (t > 0) & ~decreases(rows.residual, at_base, t)
            t = np.where(worse, t / 2, 1).astype(dtype)
            fresh = ~worse
            base[fresh], picard[fresh], at_base[fresh] = rows.Z[fresh], rows.F[fresh], rows.residual[fresh]
            if fresh.any():
                moved = rows.take(fresh)
                self.accept(moved)
                direction[fresh] = self.newton_direction(moved)
            rows.Z = base + t[:, None] * direction
            exhausted = t < SMALLEST_STEP
            rows.Z[exhausted] = picard[exhausted]
            t[exhausted] = 0
            rows.residual = at_base

    def newton_direction(self, rows: Rows) -> Array:
        """(I - D R)⁻¹ (F - Z); the Picard step F - Z where the matrix is singular to rounding, which ``singular`` notes."""
        r = rows.F - rows.Z
        A = np.eye(r.shape[1], dtype=r.dtype) - self.jacobian(rows)
        step = solve_each(A, r[..., None])[..., 0]
        # ‖A⁻¹‖ >= ‖A⁻¹r‖/‖r‖; the negation holds for NaN as well.
        largest = norm(r) / (np.finfo(r.dtype).eps * np.abs(A).sum(axis=-1).max(axis=-1))
        singular = ~(norm(step) < largest)
        self.singular[rows.index] = singular
        step[singular] = r[singular]
        return step

    def jacobian(self, rows: Rows) -> Array:
        """D R for each row (rows, n, n)."""
        R = self.equation.R[:1] if rows.R is None else rows.R
        return np.asarray(self.equation.slope(rows.S, rows.F)[..., None] * R)

    def are_located(self, rows: Rows) -> Array:
        """Whether the equilibria are where the iterates are, as far as a cheap check shows."""
        return np.ones(len(rows.Z), bool)

    def repels(self, rows: Rows) -> Array:
        """Whether the spectral radius of the Jacobian J is 1 or more.

        It is not where a power of J has a norm below 1, and it is where the trace of one, a sum of n powers of eigenvalues, is
        above n. Eigenvalues are computed only if this does not decide.
        """
        J = self.jacobian(rows)
        n, eps = J.shape[-1], float(np.finfo(J.dtype).eps)
        repels = np.zeros(len(J), bool)
        doubtful = np.flatnonzero(np.isfinite(J).all(axis=(1, 2)))
        power, size = J[doubtful], np.zeros(len(doubtful))
        with np.errstate(over="ignore", invalid="ignore"):
            for k in range(_SQUARINGS + 1):
                power = power @ power if k else power
                rounding = 2**k * eps * size**2  # of the power, in its Euclidean norm
                size = np.linalg.norm(power, axis=(1, 2))
                largest_column = np.abs(power).sum(axis=1).max(axis=-1, initial=0)
                attracts = np.minimum(largest_column, size) < 1
                grows = ~attracts & (np.abs(np.trace(power, axis1=1, axis2=2)) > n + n**0.5 * rounding)
                repels[doubtful[grows]] = True
                left = ~(attracts | grows)
                power, doubtful, size = power[left], doubtful[left], size[left]
                if not len(doubtful):
                    break
        if len(doubtful):
            repels[doubtful] = np.abs(np.linalg.eigvals(J[doubtful])).max(axis=-1) >= 1
        return repels

    def auto(self, solver: Auto) -> None:
        """Picard iteration while it is fast, Newton's method or Anderson acceleration for the samples that are slow."""
        slow: list[Rows] = []
        self.rescued = slow
        self.picard(solver.max_iterations, slow=slow)
        self.rescued = None
        if not slow:
            return
        self.rows = _join(slow)
        self.rate = np.zeros(len(self.rows.index))
        start = replace(self.rows, Z=self.rows.Z.copy())
        outcome, self.outcome = self.outcome, Outcome.converged(*self.shape[:2])
        if self.shape[-1] > _DENSE:
            self.anderson(Anderson(), _ANDERSON_STEPS)
        rows = self.rows
        self.limit[rows.index] = np.minimum(self.limit[rows.index], rows.iterations + _NEWTON_STEPS)
        self.newton()
        if self.equation.check_stability:
            self.persist(start, solver.max_iterations)
        outcome.merge(start.index, *(values[start.index] for values in self.outcome.flat()))
        self.outcome = outcome

    def persist(self, rows: Rows, limit: int) -> None:
        """Picard iteration from ``rows`` again, for those the faster methods have failed: it may be slow only for a while, as
        where two equilibria have just vanished, unless it swings to and fro. Where it finds nothing, what those methods have
        found remains.
        """
        before = self.outcome
        status, iterations, *_ = before.flat()
        rows = rows.take((status[rows.index] != CONVERGED) & (iterations[rows.index] <= limit - 2))
        once = self.equation.f(self.product(rows, rows.Z) + rows.U)
        twice = self.equation.f(self.product(rows, once) + rows.U)
        iterations[rows.index] += 2
        rows = replace(rows.take(((twice - once) * (once - rows.Z)).sum(axis=1) > 0))
        index, rows.iterations = rows.index, iterations[rows.index]
        rows.residual = np.full_like(rows.residual, np.inf)
        ends = [(array, array[index]) for array in (self.Z, self.S, self.F)]
        budget = np.minimum(limit - rows.iterations, _LAST_STEPS)
        self.limit[index] = rows.iterations + budget
        self.forget(rows)
        self.outcome, self.trial = Outcome.converged(*self.shape[:2]), None
        for steps in np.unique(budget[budget > 0]):
            self.rows = rows.take(budget == steps)
            self.rate = np.zeros(len(self.rows.index))
            self.picard(int(steps))
        found = (budget > 0) & (self.outcome.flat()[0][index] == CONVERGED)
        for array, end in ends:
            array[index[~found]] = end[~found]
        for kept, last in zip(before.flat(), self.outcome.flat(), strict=True):
            kept[index[found]] = last[index[found]]
        np.maximum(iterations, self.outcome.iterations.reshape(-1), out=iterations)
        self.outcome = before


METHODS: dict[type[Solver], Callable[[Solve, Any], None]] = {
    Auto: Solve.auto,
    Picard: lambda solve, solver: solve.picard(solver.max_iterations, solver.damping),
    Anderson: lambda solve, solver: solve.anderson(solver, solver.max_iterations),
    Newton: lambda solve, solver: solve.newton(),
}
"""The method of each solver of this engine; subclasses are not supported."""


def _join(parts: list[Rows]) -> Rows:
    def joined(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in parts])

    return Rows(
        *(joined(f.name) for f in fields(Rows) if f.name != "R"),  # type: ignore[misc]
        R=None if parts[0].R is None else joined("R"),
    )


def decreases(norm: Any, before: Any, t: Any) -> Any:
    """Whether the fraction ``t`` of a Newton step has reduced the norm of the residual sufficiently (Armijo)."""
    return norm < (1 - 1e-4 * t) * before


def solve_each(A: Array, b: Array) -> Array:
    """x with A x = b for a stack of systems (..., n, n) and (..., n, 1); NaN for a singular one, without affecting others."""
    if A.shape[-1] == 1:
        with np.errstate(all="ignore"):  # as LAPACK is silent
            return np.divide(b, A, out=np.full_like(b, np.nan), where=A != 0)
    try:
        return np.linalg.solve(A, b)
    except np.linalg.LinAlgError:
        x = np.full_like(b, np.nan)
        for place in np.ndindex(A.shape[:-2]):
            with contextlib.suppress(np.linalg.LinAlgError):
                x[place] = np.linalg.solve(A[place], b[place])
        return x


def transposed(A: Array) -> Array:
    """Each matrix of a stack, transposed."""
    return np.swapaxes(A, -1, -2)
