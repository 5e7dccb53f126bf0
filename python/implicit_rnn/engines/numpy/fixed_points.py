"""Fixed points of a Python function, many samples at once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np

from implicit_rnn.engines.numpy.functions import PythonFunction
from implicit_rnn.engines.numpy.sizes import Sizes, far_step
from implicit_rnn.engines.numpy.solvers import BLOW_UP, Outcome, Rows, Solve, StageEquation

Array = np.ndarray


class FixedPoint(Solve):
    """The solvers of the NumPy engine with f in place of R z, the identity as activation, and u = 0."""

    def __init__(self, f: PythonFunction, tol: float, outcome: Outcome) -> None:
        identity = StageEquation(np.empty((1, 0, 0)), lambda S: S, lambda S, F: S, tol, check_stability=True)
        start = f.equation.start
        super().__init__(identity, np.zeros_like(start)[None], start[None], outcome)
        self.f, self.sizes = f, Sizes(f.equation, tol)
        self.outset = np.full(f.equation.samples, np.nan)

    def until_check(self, first: int) -> int:
        """Few, as f may take long."""
        return min(super().until_check(first), 4)

    def product(self, rows: Rows, V: Array) -> Array:
        return self.f.values.real(V, rows.index)

    def size(self, V: Array) -> Array:
        return self.sizes(V)

    def scale(self, rows: Rows) -> Array:
        return self.sizes.reference(self.sizes(rows.F), rows.index)

    def accept(self, rows: Rows) -> None:
        self.sizes.record(self.sizes(rows.F), rows.index)

    def forget(self, rows: Rows) -> None:
        self.sizes.begin(rows.index)

    def restart(self, rows: Rows) -> Array:
        self.forget(rows)
        return self.f.equation.start[rows.index]

    def settle(self, rows: Rows, scale: Array, spent: Array) -> Array:
        """Which rows have converged; rows whose small steps approach zero are set to zero if it solves the equation."""
        size = self.sizes(rows.F)
        near = self.sizes.near(rows.residual, size, rows.index, self.rate)
        zero = self.sizes.lingers(rows.residual, size, rows.index, self.rate, spent) & ~near
        if zero.any():
            zero[zero] = self.f.solved_by_zero(rows.index[zero])
            if not self.stability_in_question:  # else that is judged in the end
                at = replace(rows.take(zero), Z=np.zeros_like(rows.Z[zero]))
                with suppress(Exception):  # f need not have values around zero
                    zero[zero] = ~self.repels(at)
            rows.Z[zero] = rows.F[zero] = rows.residual[zero] = 0
        return np.asarray(near | zero)

    def jacobian(self, rows: Rows) -> Array:
        return self.f.jacobian(rows.Z, rows.index)

    def newton_direction(self, rows: Rows) -> Array:
        r = rows.F - rows.Z
        step, _ = self.f.newton_steps(rows.Z, rows.index, r)
        exists = np.isfinite(step).all(axis=1)
        self.singular[rows.index] = ~exists
        return np.where(exists[:, None], step, r)

    def are_located(self, rows: Rows) -> Array:
        """Whether the Newton steps from fixed points, which estimate their errors, lead to a fixed point.

        There may be no fixed point however small f(z) - z is, as for z = z + 1/z.
        """
        r = rows.F - rows.Z
        if self.trial is not None:  # Newton's method finds any point of a line of fixed points, and exactly
            uneven = np.random.default_rng(0).uniform(0.5, 1, r.shape[1]).astype(r.dtype)
            r += np.copysign(np.finfo(r.dtype).eps * uneven * rows.F, r)
        located = ~r.any(axis=1)
        if not self.f.is_large and len(left := np.flatnonzero(~located)):
            index = rows.index[left]
            step, _ = self.f.newton_steps(rows.Z[left], index, r[left])
            size = np.fmax(self.sizes(rows.F[left]), self.sizes.largest[index])
            located[left] = self.sizes(step) <= far_step(self.sizes.tol) * size
        return located | self.f.is_large

    def repels(self, rows: Rows) -> Array:
        if not self.f.is_large:
            return super().repels(rows)
        return np.array([self.f.operator(z, int(k)).repels() for z, k in zip(rows.Z, rows.index, strict=True)], bool)

    def largest(self, rows: Rows) -> Array:
        # By the sizes at the start: z may have any unit.
        new = np.isnan(self.outset[rows.index])
        fresh = rows.index[new]
        self.outset[fresh] = np.maximum(self.sizes(rows.Z[new]), self.sizes(rows.F[new]))
        return np.asarray(BLOW_UP * self.outset[rows.index])
