"""Roots of a Python function: Newton's method on many samples at once, and Powell's hybrid method for what it leaves."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np

from implicit_rnn.engines.numpy.functions import PythonFunction
from implicit_rnn.engines.numpy.single import ANSWER, PROBE, SMALLEST_STEP, far_step
from implicit_rnn.engines.numpy.sizes import Sizes, euclidean
from implicit_rnn.engines.numpy.solvers import Outcome, decreases
from implicit_rnn.solution import CONVERGED, MAX_ITERATIONS, NON_FINITE, SINGULAR
from implicit_rnn.solvers import Auto, Solver

Array = np.ndarray

EQUAL_TERMS = 1e8
"""Conditions whose terms differ less at the start count alike in ‖c‖, as long as that leads on."""
_LEFT_OF_CONDITIONS = 0.5
"""What is left of ‖c‖ behind a step to a root, at most."""


def newton_limit(solver: Solver) -> int:
    """Evaluations of the first attempt at a root, which leaves some for the next."""
    limit = int(solver.max_iterations)
    return max(limit // 5, min(limit, 60)) if isinstance(solver, Auto) else limit


class Root:
    """Newton's method with a line search on ‖f‖ until the step is small, and Powell's hybrid method for what it leaves."""

    def __init__(self, f: PythonFunction, tol: float, solver: Solver) -> None:
        self.f, self.solver, self.limit = f, solver, int(solver.max_iterations)
        self.hybrid = isinstance(solver, Auto) and not f.is_large
        self.sizes = Sizes(f.equation, tol)

    def run(self, outcome: Outcome) -> Array:
        """The roots (B, n)."""
        start = self.f.equation.start
        samples = np.arange(len(start))
        first = newton_limit(self.solver) if self.hybrid else self.limit
        Z, status, evaluations, residual, rate = self.newton(start, samples, np.zeros(len(start), np.int32), first)
        for k in np.flatnonzero((status == SINGULAR) | (status == MAX_ITERATIONS)) if self.hybrid else ():
            for factor, scaled in ((100.0, True), (1.0, True), (1.0, False), (0.1, True)):
                if evaluations[k] >= self.limit:
                    break
                z, used = self.powell(start[k], int(k), self.limit - int(evaluations[k]), factor, scaled)
                evaluations[k] += used
                one = slice(k, k + 1)
                found = self.newton(z[None], samples[one], evaluations[one], self.limit, start[one] - z)
                if found[1][0] == CONVERGED or factor == 0.1:
                    Z[one], status[one], evaluations[one], residual[one], rate[one] = found
                    if status[k] == CONVERGED:
                        break
                else:
                    evaluations[one] = found[2]
        outcome.merge(samples, status, evaluations, residual, rate)
        return Z

    def newton(
        self, start: Array, rows: Array, used: Array, limit: int, back: Array | None = None
    ) -> tuple[Array, ...]:
        """Roots, statuses, evaluations (``used`` before), relative steps and rates of the samples ``rows``.

        ``back`` leads to where the start has come from; without it a root that one starts at is believed.
        """
        f, sizes, count = self.f, self.sizes, len(rows)
        Z, status = start.copy(), np.full(count, MAX_ITERATIONS)
        evaluations, residual, rate = used.astype(np.int32), np.full(count, np.inf), np.zeros(count)
        last, last_merit = np.full(count, np.inf), np.full(count, np.inf)
        F, weights, first = np.full_like(Z, np.nan), np.ones(Z.shape), True
        back = np.zeros_like(Z) if back is None else back
        sizes.begin(rows)
        going = np.flatnonzero(evaluations < limit)
        if len(going):
            F[going] = f.conditions(Z[going], rows[going])
            evaluations[going] += 1
        while len(going):
            index, z, c = rows[going], Z[going], F[going]
            merit = euclidean(c * weights[going])
            step, terms = f.newton_steps(z, index, c)
            exists = np.isfinite(step).all(axis=1)
            if first:
                weights[going] = _row_weights(terms, EQUAL_TERMS)
                merit, first = euclidean(c * weights[going]), False
            length = np.where(exists, sizes(np.where(exists[:, None], step, 0)), np.where(merit == 0, 0, np.inf))
            size = sizes(z)
            sizes.pass_by(size, index)
            reference = sizes.reference(size, index)
            quotient = np.where(np.isfinite(last[going]), length / np.where(last[going] > 0, last[going], 1), 0)
            spent = evaluations[going] >= limit
            broken = ~(np.isfinite(merit) & np.isfinite(size))
            done = sizes.near(length, size, index, quotient, spent) & ~broken
            if (ended := ~exists & done & (evaluations[going] > 1)).any() and not f.is_large:
                # A condition that has faded away, as exp(-z) does, is zero with all its derivatives.
                done[ended] = (f.conditions_jacobian(z[ended], index[ended]) != 0).any(axis=2).all(axis=1)
            proven = np.isfinite(last[going]) & (merit <= _LEFT_OF_CONDITIONS * last_merit[going])
            last_merit[going] = merit
            doubtful = done & exists & ~proven & (merit > 0)
            if doubtful.any():
                done[doubtful] = _is_steady(f, z[doubtful], index[doubtful], step[doubtful], c[doubtful])
            far = (last[going] > far_step(sizes.tol) * np.fmax(sizes.largest[index], size)) & (last[going] < np.inf)
            if (sudden := done & exists & (far | back[going].any(axis=1) & ~np.isfinite(last[going]))).any():
                sudden[sudden] = ~self.answers(z[sudden], back[going[sudden]], index[sudden], c[sudden])
                done, exists = done & ~sudden, exists & ~sudden
            residual[going] = np.where(broken, np.nan, np.where(length == 0, 0, length / reference))
            rate[going], last[going] = quotient, np.where(doubtful & ~done, np.inf, length)
            # The last step is there, and as good as another iteration.
            Z[going] = np.where((done & exists)[:, None], z + step, z)
            status[going] = np.where(
                done, CONVERGED, np.where(broken, NON_FINITE, np.where(exists, MAX_ITERATIONS, SINGULAR))
            )
            moving = ~(done | broken | ~exists | spent)
            settled = (length <= sizes.rounding(size, index))[moving]
            searched, step = going[moving], step[moving]
            base = Z[searched]
            search = partial(self.search, Z, F, weights, rows, evaluations, status, limit)
            going = search(searched, step)
            failed = status[searched] == SINGULAR
            if (found := failed & settled).any():  # a root to rounding, from which nothing leads on
                found[found] = _is_steady(f, Z[searched[found]], rows[searched[found]], step[found], F[searched[found]])
                status[searched[found]] = CONVERGED
            if (stuck := failed & ~found & (Z.shape[1] > 1)).any():
                once_more, step = searched[stuck], step[stuck]
                status[once_more] = MAX_ITERATIONS
                weights[once_more] = _row_weights(terms[moving][stuck])
                last_merit[once_more] = euclidean(F[once_more] * weights[once_more])
                going = np.sort(np.append(going, search(once_more, step)))
            back[searched] = base - Z[searched]
        return Z, status, evaluations, residual, rate

    def search(
        self,
        Z: Array,
        F: Array,
        weights: Array,
        rows: Array,
        evaluations: Array,
        status: Array,
        limit: int,
        going: Array,
        step: Array,
    ) -> Array:
        """z + t step with t halved until ‖f‖, weighted, decreases; returns those of ``going`` where it did."""
        base, t, better = Z[going].copy(), 1.0, np.zeros(len(going), bool)
        merit = euclidean(F[going] * weights[going])
        while t >= SMALLEST_STEP:
            trying = np.flatnonzero(~better & (evaluations[going] < limit))
            if not len(trying):
                break
            z = base[trying] + base.dtype.type(t) * step[trying]
            c = self.f.conditions(z, rows[going[trying]])
            evaluations[going[trying]] += 1
            good = decreases(euclidean(c * weights[going[trying]]), merit[trying], t) & np.isfinite(z).all(axis=1)
            Z[going[trying[good]]], F[going[trying[good]]] = z[good], c[good]
            better[trying[good]] = True
            t /= 2
        status[going[~better & (evaluations[going] < limit)]] = SINGULAR
        return going[better]

    def answers(self, Z: Array, back: Array, rows: Array, C: Array) -> Array:
        """Whether f changes about as its derivatives say on the way ``back`` from roots that were suddenly there.

        If it does not, it is rounding that makes the conditions zero, as those of z/(1 + z) = 1 from 1e16 on: that root is
        anywhere.
        """
        if self.f.is_large:
            return np.ones(len(Z), bool)
        there = Z + Z.dtype.type(PROBE) * back
        found, expected = self.f.newton_steps(Z, rows, C - self.f.conditions(there, rows))[0], there - Z
        each = ~(ANSWER * np.abs(found) < np.abs(expected)).any(axis=1)
        return np.asarray(each & ~(self.sizes(found) > ANSWER * self.sizes(expected)))

    def powell(self, start: Array, sample: int, budget: int, factor: float, scaled: bool) -> tuple[Array, int]:
        """MINPACK's hybrid method by SciPy, on unknowns and conditions of the size 1; the best iterate, and evaluations."""
        from scipy import optimize

        f, row = self.f, np.array([sample])
        dtype, used = start.dtype, 0
        best, best_merit = start.copy(), np.inf
        c0 = f.conditions(start[None], row)
        used += 1
        row_weights = _row_weights(f.newton_steps(start[None], row, c0)[1], EQUAL_TERMS)[0]
        unit_of_c = float(euclidean(c0 * row_weights)[0])
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
            c = f.conditions(z[None], row)[0] * (row_weights / unit_of_c)
            if not (np.isfinite(z).all() and np.isfinite(c).all()):
                return np.full(len(x), 1e30)
            if (merit := float(np.linalg.norm(c))) < best_merit:
                best, best_merit = z, merit
            return c

        def jacobian(x: Array) -> Array:
            z = (x * units).astype(dtype)
            J = f.conditions_jacobian(z[None], row)[0] * units * (row_weights / unit_of_c)[:, None]
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


def _row_weights(terms: Array, equal: float = 1.0) -> Array:
    """Of the conditions (m, n) in ‖c‖, by the ``terms`` of their linear model; 1 where those differ by less than ``equal``.

    Conditions of very different units hide each other in ‖c‖: what rounding leaves of a large one may be more than all of a
    small one.
    """
    terms = terms.astype(np.float64)
    usual = (terms > np.finfo(np.float64).tiny) & (terms < np.inf)
    terms = np.where(usual, terms, 1)
    differ = terms.max(axis=1, keepdims=True) > equal * terms.min(axis=1, keepdims=True)
    return np.where(differ & usual.all(axis=1, keepdims=True), 1 / terms, 1)


def _is_steady(f: PythonFunction, Z: Array, rows: Array, steps: Array, C: Array) -> Array:
    """Whether A is about the same two steps further, along the step.

    A short step to a root makes the conditions much smaller than they were, unless one starts there. Newton's steps are as
    short at a pole, from which they lead away, and where f has an infinite slope, as √z + 1 at zero.
    """
    further = Z + 2 * steps + 8 * np.finfo(Z.dtype).eps * Z
    if f.is_large:
        products = np.stack(
            [f.operator(z, int(row)).product(d) for z, row, d in zip(further, rows, steps, strict=True)]
        )
    else:
        products = (f.conditions_jacobian(further, rows) @ steps[..., None])[..., 0]
    return np.asarray(euclidean(products + C) <= 0.5 * euclidean(C))
