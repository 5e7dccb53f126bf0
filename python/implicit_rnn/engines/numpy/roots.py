"""Roots of a Python function: Newton's method on many samples at once, and Powell's hybrid method for what it leaves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from implicit_rnn.engines.numpy.functions import PythonFunction
from implicit_rnn.engines.numpy.sizes import BACKSTEP, RESPONSE, SMALLEST_ROOT_STEP, Sizes, far_step
from implicit_rnn.engines.numpy.solvers import Outcome, decreases
from implicit_rnn.engines.numpy.values import tolerance
from implicit_rnn.errors import silenced
from implicit_rnn.norms import scaled_norm
from implicit_rnn.solution import CONVERGED, MAX_ITERATIONS, NON_FINITE, SINGULAR
from implicit_rnn.solvers import Auto, Solver

Array = np.ndarray

EQUAL_TERMS = 1e8
"""Conditions whose terms differ less at the start count alike in ‖c‖, as long as that leads on."""
_LEFT_OF_CONDITIONS = 0.5
"""What is left of ‖c‖ behind a step to a root, at most."""
_LEAST_ATTEMPT = 60
"""Evaluations that an attempt may use, whatever its share."""
_POWELL = ((100.0, True), (1.0, True), (1.0, False), (0.1, True))
"""The attempts by Powell's method: the ``factor`` of MINPACK, its first trust region, and whether it scales the unknowns."""


def newton_limit(solver: Solver) -> int:
    """Evaluations of the first attempt at a root, which leaves some for the next."""
    limit = int(solver.max_iterations)
    return max(limit // 5, min(limit, _LEAST_ATTEMPT)) if isinstance(solver, Auto) else limit


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
        Z, status, evaluations, residual, rate = _Newton(self, start, samples, np.zeros(len(start)), first).run()

        def keep(newton: _Newton, last: bool = False) -> Array:
            """Keep what has converged, or the ``last`` there is; returns the samples that go on."""
            rows, found = newton.rows, newton.run()
            ended = (found[1] == CONVERGED) | last
            for kept, part in zip((Z, status, residual, rate), (*found[:2], *found[3:]), strict=True):
                kept[rows[ended]] = part[ended]
            evaluations[rows] = found[2]
            return rows[~ended & (evaluations[rows] < self.limit)]

        unsolved = ((status == SINGULAR) | (status == MAX_ITERATIONS)) & (evaluations < self.limit)
        left = np.flatnonzero(unsolved & self.hybrid)
        for attempt, (factor, scaled) in enumerate(_POWELL):
            if not len(left):
                break
            near = start[left]
            for z, k in zip(near, left, strict=True):
                z[:], used = self.powell(start[k], int(k), self.limit - int(evaluations[k]), factor, scaled)
                evaluations[k] += used
            newton = _Newton(self, near, left, evaluations[left], self.limit, start[left] - near)
            left = keep(newton, last=attempt == len(_POWELL) - 1)
            if attempt == 0 and len(left):
                # Whole Newton steps leave the local minima of ‖f‖, where everything else ends.
                limits = np.minimum(self.limit, evaluations[left] + max(self.limit // 10, _LEAST_ATTEMPT))
                left = keep(_Newton(self, start[left], left, evaluations[left], limits, whole=True))
        outcome.merge(samples, status, evaluations, residual, rate)
        return Z

    def powell(self, start: Array, sample: int, budget: int, factor: float, scaled: bool) -> tuple[Array, int]:
        """MINPACK's hybrid method by SciPy, on unknowns and conditions of the size 1; the best iterate, and evaluations."""
        from scipy import optimize

        f, row = self.f, np.array([sample])
        dtype, used = start.dtype, 0
        best, best_merit = start.copy(), np.inf
        c0 = f.conditions(start[None], row)
        used += 1
        row_weights = _row_weights(f.newton_steps(start[None], row, c0)[1], EQUAL_TERMS)[0]
        unit_of_c = float(scaled_norm(c0 * row_weights)[0])
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
            with silenced():
                optimize.root(
                    conditions, start.astype(np.float64) / units, jac=jacobian, method="hybr", options=options
                )
        except _SpentError:
            pass
        return best, used


class _SpentError(Exception):
    pass


@dataclass
class _Steps:
    """Newton's steps from z, one a row, of the samples ``going``, which are ``rows`` of the equation; which of them are done.

    ``terms`` are those of the linear models of the conditions c, and ``merit`` is ‖c‖.
    """

    going: Array
    rows: Array
    z: Array
    c: Array
    step: Array
    terms: Array
    exists: Array
    merit: Array
    length: Array
    size: Array
    rate: Array
    spent: Array
    broken: Array
    done: Array


class _Newton:
    """Newton's method on the samples ``rows`` of an equation, which have ``used`` some evaluations before.

    ``back`` leads to where the start has come from; without it a root that one starts at is believed. ``last`` is the length of
    the step before and ``last_merit`` is ‖c‖ where it began, infinite where there was none. Steps are taken
    ``whole``, or halved until ‖c‖ decreases.
    """

    def __init__(
        self,
        root: Root,
        start: Array,
        rows: Array,
        used: Array,
        limit: int | Array,
        back: Array | None = None,
        *,
        whole: bool = False,
    ) -> None:
        count, self.whole = len(rows), whole
        self.f, self.sizes, self.rows = root.f, root.sizes, rows
        self.limit = np.broadcast_to(limit, count)
        self.Z, self.F = start.copy(), np.full_like(start, np.nan)
        self.weights = np.ones(start.shape)
        self.back = np.zeros_like(start) if back is None else back
        self.status, self.evaluations = np.full(count, MAX_ITERATIONS), used.astype(np.int32)
        self.residual, self.rate = np.full(count, np.inf), np.zeros(count)
        self.last, self.last_merit = np.full(count, np.inf), np.full(count, np.inf)

    def run(self) -> tuple[Array, ...]:
        """Roots, statuses, evaluations, relative steps and rates."""
        self.sizes.begin(self.rows)
        going = np.flatnonzero(self.evaluations < self.limit)
        if len(going):
            self.F[going] = self.f.conditions(self.Z[going], self.rows[going])
            self.evaluations[going] += 1
        first = True
        while len(going):
            steps = self.steps(going, first)
            self.judge(steps)
            self.vanish(steps)
            self.note(steps)
            going, first = self.advance(steps), False
        return self.Z, self.status, self.evaluations, self.residual, self.rate

    # --- one step ----------------------------------------------------------------------------------------

    def steps(self, going: Array, first: bool) -> _Steps:
        rows, z, c, last = self.rows[going], self.Z[going], self.F[going], self.last[going]
        step, terms = self.f.newton_steps(z, rows, c)
        exists = np.isfinite(step).all(axis=1)
        if first:
            self.weights[going] = _row_weights(terms, EQUAL_TERMS)
        merit, size = scaled_norm(c * self.weights[going]), self.sizes(z)
        self.sizes.record(size, rows)
        length = np.where(exists, self.sizes(np.where(exists[:, None], step, 0)), np.where(merit == 0, 0, np.inf))
        rate = np.where(np.isfinite(last), length / np.where(last > 0, last, 1), 0)
        spent = self.evaluations[going] >= self.limit[going]
        broken = ~(np.isfinite(merit) & np.isfinite(size))
        done = self.sizes.near(length, size, rows, rate) & ~broken
        return _Steps(going, rows, z, c, step, terms, exists, merit, length, size, rate, spent, broken, done)

    def judge(self, s: _Steps) -> None:
        """Take back that samples are done where their steps are short without a root."""
        self.doubt_faded(s)
        doubtful = self.doubt_poles(s)
        self.doubt_jumps(s)
        self.doubt_sudden(s)
        self.last[s.going] = np.where(doubtful & ~s.done, np.inf, s.length)

    def doubt_faded(self, s: _Steps) -> None:
        """A condition that has faded away, as exp(-z) does, is zero with all its derivatives and all around; |z| at 0 is not."""
        if (ended := ~s.exists & s.done & (self.evaluations[s.going] > 1)).any() and not self.f.is_large:
            z, rows, going = s.z[ended], s.rows[ended], s.going[ended]
            way = z.dtype.type(BACKSTEP) * self.back[going]
            around = np.stack([self.f.conditions(z + way, rows), self.f.conditions(z - way, rows)])
            merits = np.stack([scaled_norm(c * self.weights[going]) for c in around])
            expected = BACKSTEP * self.last_merit[going]
            responds = ((expected <= RESPONSE * merits) & (merits <= RESPONSE * expected)).all(axis=0)
            kinked = (around != 0).all(axis=0) & responds[:, None]
            s.done[ended] = (kinked | (self.f.conditions_jacobian(z, rows) != 0).any(axis=2)).all(axis=1)

    def doubt_poles(self, s: _Steps) -> Array:
        """Poles, from which steps lead away: ‖c‖ has not shrunk on the way there. Returns which were doubted."""
        proven = np.isfinite(self.last[s.going]) & (s.merit <= _LEFT_OF_CONDITIONS * self.last_merit[s.going])
        self.last_merit[s.going] = s.merit
        if (doubtful := s.done & s.exists & ~proven & (s.merit > 0)).any():
            s.done[doubtful] = _is_steady(self.f, s.z[doubtful], s.rows[doubtful], s.step[doubtful], s.c[doubtful])
        return doubtful

    def doubt_jumps(self, s: _Steps) -> None:
        """Leaps of f over zero: only parts of Newton steps lead to there."""
        moved = self.sizes(self.back[s.going])
        if (part := s.done & s.exists & (moved > 0) & ~(moved >= 0.9 * self.last[s.going])).any():
            s.done[part] = ~_jumps(self.f, s.z[part], s.rows[part], s.step[part], s.c[part], s.terms[part])

    def doubt_sudden(self, s: _Steps) -> None:
        """Conditions that only rounding makes zero: the root is suddenly there, behind a long step or the way to the start."""
        last, largest = self.last[s.going], np.fmax(self.sizes.largest[s.rows], s.size)
        far = (last > far_step(self.sizes.tol) * largest) & (last < np.inf)
        at_start = self.back[s.going].any(axis=1) & ~np.isfinite(last)
        if (sudden := s.done & s.exists & (far | at_start)).any():
            sudden[sudden] = ~self.responds(s.z[sudden], self.back[s.going[sudden]], s.rows[sudden], s.c[sudden])
            s.done, s.exists = s.done & ~sudden, s.exists & ~sudden

    def vanish(self, s: _Steps) -> None:
        """Samples whose small steps go to zero, which solves the equation, are there."""
        lingering = self.sizes.lingers(s.length, s.size, s.rows, s.rate, s.spent) & s.exists & ~(s.done | s.broken)
        at = np.flatnonzero(lingering)
        at = at[self.f.solved_by_zero(s.rows[at])]
        s.step[at], s.length[at], s.done[at] = -s.z[at], 0, True

    def note(self, s: _Steps) -> None:
        """Keep how the samples stand, with the last step of those that are done."""
        relative = np.where(s.length == 0, 0, s.length / self.sizes.reference(s.size, s.rows))
        self.residual[s.going], self.rate[s.going] = np.where(s.broken, np.nan, relative), s.rate
        # The last step is there, and as good as another iteration.
        self.Z[s.going] = np.where((s.done & s.exists)[:, None], s.z + s.step, s.z)
        failed = np.where(s.broken, NON_FINITE, np.where(s.exists, MAX_ITERATIONS, SINGULAR))
        self.status[s.going] = np.where(s.done, CONVERGED, failed)

    def advance(self, s: _Steps) -> Array:
        """Take the steps of the samples that have not ended; returns those that go on."""
        moving = ~(s.done | s.broken | ~s.exists | s.spent)
        settled = (s.length <= self.sizes.rounding(s.size, s.rows))[moving]
        searched, step = s.going[moving], s.step[moving]
        base = self.Z[searched]
        going = self.search(searched, step)
        if (stuck := (self.status[searched] == SINGULAR) & (base.shape[1] > 1)).any():
            at = searched[stuck]
            self.status[at] = MAX_ITERATIONS
            self.weights[at] = _row_weights(s.terms[moving][stuck])
            self.last_merit[at] = scaled_norm(self.F[at] * self.weights[at])
            going = np.sort(np.append(going, self.search(at, step[stuck])))
        if (found := (self.status[searched] == SINGULAR) & settled).any():  # a root to rounding, if nothing leads on
            at = searched[found]
            there = self.f, self.Z[at], self.rows[at], step[found], self.F[at]
            found[found] = _is_steady(*there) & ~_jumps(*there, s.terms[moving][found])
            self.status[searched[found]] = CONVERGED
        self.back[searched] = base - self.Z[searched]
        return going

    def search(self, going: Array, step: Array) -> Array:
        """z + t step with t halved until ‖f‖, weighted, decreases; returns those of ``going`` where it did."""
        base, t, better = self.Z[going].copy(), 1.0, np.zeros(len(going), bool)
        merit = scaled_norm(self.F[going] * self.weights[going])
        while t >= SMALLEST_ROOT_STEP:
            trying = np.flatnonzero(~better & (self.evaluations[going] < self.limit[going]))
            if not len(trying):
                break
            at = going[trying]
            z = base[trying] + base.dtype.type(t) * step[trying]
            c = self.f.conditions(z, self.rows[at])
            self.evaluations[at] += 1
            good = self.whole | decreases(scaled_norm(c * self.weights[at]), merit[trying], t)
            good &= np.isfinite(z).all(axis=1)
            self.Z[at[good]], self.F[at[good]] = z[good], c[good]
            better[trying[good]] = True
            t /= 2
        self.status[going[~better & (self.evaluations[going] < self.limit[going])]] = SINGULAR
        return going[better]

    def responds(self, Z: Array, back: Array, rows: Array, C: Array) -> Array:
        """Whether f changes about as its derivatives say on the way ``back`` from roots that were suddenly there.

        If it does not, it is rounding that makes the conditions zero, as those of z/(1 + z) = 1 from 1e16 on: that root is
        anywhere.
        """
        if self.f.is_large:
            return np.ones(len(Z), bool)
        there = Z + Z.dtype.type(BACKSTEP) * back
        found, expected = self.f.newton_steps(Z, rows, C - self.f.conditions(there, rows))[0], there - Z
        each = ~(RESPONSE * np.abs(found) < np.abs(expected)).any(axis=1)
        return np.asarray(each & ~(self.sizes(found) > RESPONSE * self.sizes(expected)))


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
    return np.asarray(scaled_norm(products + C) <= 0.5 * scaled_norm(C))


def _jumps(f: PythonFunction, Z: Array, rows: Array, steps: Array, C: Array, terms: Array) -> Array:
    """Whether f, a sum of these ``terms``, jumps a little further on or back, as floor(z) does at whole numbers."""
    way = 2 * steps + np.copysign(8 * np.finfo(Z.dtype).eps * Z, steps)
    there = np.maximum(*(scaled_norm(f.conditions(Z + d, rows)) for d in (way, -way)))
    return (3 * scaled_norm(C) + tolerance(Z.dtype) * scaled_norm(terms) < there) & (there < np.inf)
