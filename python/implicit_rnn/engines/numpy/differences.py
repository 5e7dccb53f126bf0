"""Derivatives of a Python function from its values: by the complex step, or by difference quotients.

None is trusted without a check against the values: the complex step is compared with a difference quotient along one
direction, and difference quotients with those of another step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from implicit_rnn.engines.numpy.sparsity import Group, find_groups
from implicit_rnn.engines.numpy.values import STATE, Values, tolerance
from implicit_rnn.errors import DerivativeWarning, silenced, warn

Array = np.ndarray
Block = tuple[Array, Array, Array]
"""Entries of a variable, the outputs that depend on them, and the derivatives (m, len(outputs)) of the second by the first."""

_ALIKE = 1e3
"""Entries of a variable are perturbed together if their sizes differ by less than this factor."""
FEW = 128
"""Number of entries of a variable up to which each is perturbed on its own."""
_LARGEST_DOUBT = 0.1
"""The uncertainty, relative to the largest derivative, up to which a quotient is trusted in any precision."""
_FAINT = 1e-6
"""Faint is a derivative by which f changes less than so, relative to its terms, when the variable doubles."""
_FLAT_STEP = 0.06
"""The relative step at which an f that does not change is accepted as flat."""


class _Quotients(NamedTuple):
    """Difference quotients by one step and by half of it, for m samples."""

    fine: Array
    """(m, n) by half of it"""
    extrapolated: Array
    """(m, n)"""
    doubt: Array
    """(m,) how far the two differ, or may by rounding"""
    flat: Array
    """(m,) whether f has not changed at all"""
    good: Array
    """(m,) whether the two agree, second differences shrink, as for a smooth function, and rounding matters little"""


class Differences:
    """The derivatives of a function with respect to z or an argument, at iterates Z (m, n) of the samples ``rows`` (m,)."""

    def __init__(self, f: Values) -> None:
        self._f = f
        self._analytic: dict[int, Array] = {}
        self._groups: dict[int, list[Group] | None] = {}

    def derivatives(self, Z: Array, rows: Array, variable: int, certain: bool = False) -> Iterable[Block]:
        """∂f/∂x for all entries x of a variable as one sample sees it.

        By the complex step for rows on which it agrees with a difference quotient, else by difference quotients, where
        those of one step and of half of it must agree. If ``certain``, each row is checked at this Z, and
        rows without a trustworthy derivative are NaN, with a warning; otherwise the check at the first Z is reused, and
        such rows get their best quotient. Entries that share no output are perturbed together.
        """
        if not len(rows):
            return []
        analytic = self.is_analytic(Z, rows, variable, certain)
        grouped = self.grouped(Z, rows, variable, certain) if analytic.all() else None
        return self._one_by_one(Z, rows, variable, certain, analytic) if grouped is None else grouped

    def is_analytic(self, Z: Array, rows: Array, variable: int, certain: bool) -> Array:
        """Whether the complex step is valid for these rows, checked at this Z if ``certain``, else at the first."""
        known = self._analytic.get(variable)
        if certain or known is None:
            known = np.zeros(self._f.equation.samples, bool) if known is None else known
            directions = self._directions_by_size(Z, rows, variable)
            known[rows] = np.all([self.directional(Z, rows, variable, d)[1] for d in directions], axis=0)
            self._analytic[variable] = known
        return known[rows]

    def directional(self, Z: Array, rows: Array, variable: int, direction: Array) -> tuple[Array, Array, Array]:
        """The derivative (m, n) along a direction, whether it is by the complex step (m,), and its uncertainty (m,).

        The complex step is trusted where it agrees with a difference quotient, which it does not if f drops Im x. The
        uncertainty is infinite where quotients disagree.
        """
        D, doubt = self._difference(Z, rows, variable, direction)
        try:
            with silenced():
                found = self.complex_step(Z, rows, variable, direction)
        except Exception:
            return D, np.zeros(len(rows), bool), doubt

        def agree(D: Array, doubt: Array, found: Array) -> Array:
            near = np.abs(found - D) <= np.maximum(tolerance(Z.dtype) * np.abs(D), doubt[:, None])
            return np.asarray(np.isfinite(doubt) & near.all(axis=1))

        analytic = agree(D, doubt, found)
        lost = np.flatnonzero(~analytic & np.isfinite(found).all(axis=1) & found.any(axis=1))
        if len(lost):
            with contextlib.suppress(Exception), silenced():  # of f where it was not to be looked at
                distance = self._distances(Z[lost], rows[lost], found[lost])
                distance = np.fmax(distance, self._sizes(Z[lost], rows[lost], variable, direction)[0])
                # Entries that are zero to rounding move too little: increase the step until f changes, and once more. Where f has
                # changed, no farther: from afar any f looks like its steepest terms, as z - cos(|z|) like z.
                was_flat = ~(D[lost].any(axis=1) & np.isfinite(doubt[lost]))
                while len(lost):
                    again = self._difference(Z[lost], rows[lost], variable, direction, distance)
                    # One that comes no nearer to the complex step, but leaves more doubt, says nothing for it.
                    off, off_before = (np.abs(found[lost] - quotient).max(axis=1) for quotient in (again[0], D[lost]))
                    surer = (off <= off_before / 2) | (again[1] < doubt[lost]) | ~D[lost].any(axis=1)
                    analytic[lost] = agree(*again, found[lost]) & surer
                    flat = (again[0] == 0).all(axis=1)
                    going = ~analytic[lost] & (flat | was_flat) & (distance < np.inf)
                    lost, distance, was_flat = lost[going], distance[going] * 1e8, flat[going]
        if len(faint := np.flatnonzero(~analytic & ~np.isfinite(doubt) & np.isfinite(found).all(axis=1))):
            analytic[faint] = self._confirm(Z[faint], rows[faint], variable, direction, found[faint])
        return np.where(analytic[:, None], found, D), analytic, np.where(analytic, 0, doubt)

    def _confirm(self, Z: Array, rows: Array, variable: int, direction: Array, found: Array) -> Array:
        """Whether derivatives (m, n) faint beside f, as of tanh(15), are those of larger steps to a tenth or to rounding."""
        eps, center = float(np.finfo(Z.dtype).eps), self._f(Z, rows).astype(np.float64)
        size, terms = self._sizes(Z, rows, variable, direction)[0], self._f.terms(Z, rows, center)
        largest, confirmed = np.abs(found).max(axis=1).astype(np.float64), np.full(len(rows), False)
        for part in (1e2 * eps ** (1 / 3), _FLAT_STEP):
            step = 2.0 ** np.round(np.log2(part * size))
            quotient = self._quotients(Z, rows, variable, direction, step, center, terms).extrapolated
            off, noise = np.abs(found - quotient).max(axis=1), eps * terms / (step / 2)
            confirmed |= off <= 0.1 * largest + 4 * noise
        return confirmed & (largest > 0) & (largest * size <= _FAINT * terms)

    def direction(self, Z: Array, rows: Array, variable: int) -> Array:
        """A direction in which each entry of a variable moves in proportion to its size, more or less, up to 1."""
        size = self._entry_sizes(Z, rows, variable)
        return _along(size, size.max(initial=0)).astype(Z.dtype)

    def _directions_by_size(self, Z: Array, rows: Array, variable: int) -> Iterator[Array]:
        """Directions of which each moves the entries of about one size, such that none is lost beside those of others."""
        size = self._entry_sizes(Z, rows, variable)
        if not np.isfinite(size).all():
            yield self.direction(Z, rows, variable)
            return
        while (size > 0).any():
            largest = size.max()
            alike = size > largest / _ALIKE
            yield _along(np.where(alike, size, 0), largest).astype(Z.dtype)
            size = np.where(alike, 0, size)

    def _entry_sizes(self, Z: Array, rows: Array, variable: int) -> Array:
        """The largest size of each entry in any sample, that of the largest where it is zero."""
        x, per_row = self._f.variable(Z, rows, variable)
        size = (np.abs(x).max(axis=0) if per_row else np.abs(x)).astype(np.float64)
        return np.asarray(np.where(size > 0, size, size.max(initial=0) or 1))

    def complex_step(self, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
        """Squire and Trapp, SIAM Review 40, 1998: exact to rounding for analytic f.

        In double precision for float32, too, which has no room for a step that is small beside variables of every size.
        """
        h = 1e-200
        step = direction.astype(np.complex128) * (1j * h)
        return (self._shifted(Z, rows, variable, step).imag / h).astype(Z.dtype)

    def quotient(self, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
        """The difference quotient (m, n), extrapolated."""
        return self._difference(Z, rows, variable, direction)[0]

    def grouped(self, Z: Array, rows: Array, variable: int, certain: bool) -> list[Block] | None:
        """The derivatives with respect to many entries by complex steps of groups of them, if there are few groups."""
        entries = self._f.entry_shape(variable)
        if math.prod(entries) <= FEW:
            return None
        for again in (False, True):
            new = again or variable not in self._groups
            if new:
                self._groups[variable] = self._find_groups(Z, rows, variable)
            groups = self._groups[variable]
            if groups is None:
                return None
            blocks = []
            for group in groups:
                direction = np.zeros(entries, Z.dtype)
                direction.reshape(-1)[group.inputs] = 1
                D = self.complex_step(Z, rows, variable, direction)[:, group.outputs]
                blocks.append((group.inputs, group.outputs, D))
            if not (new or certain) or self._is_complete(blocks, Z, rows, variable):
                return blocks
        self._groups[variable] = None
        return None

    def _one_by_one(self, Z: Array, rows: Array, variable: int, certain: bool, analytic: Array) -> Iterator[Block]:
        outputs = np.arange(self._f.equation.n)
        bad = np.zeros(len(rows), bool)
        direction = np.zeros(self._f.entry_shape(variable), Z.dtype)
        for k in range(direction.size):
            direction.reshape(-1)[k] = 1
            D = np.empty((len(rows), self._f.equation.n), Z.dtype)
            if analytic.any():
                chosen = np.flatnonzero(analytic)
                D[chosen] = self.complex_step(Z[chosen], rows[chosen], variable, direction)
            if not analytic.all():
                chosen = np.flatnonzero(~analytic)
                D[chosen], doubt = self._difference(Z[chosen], rows[chosen], variable, direction)
                if certain:
                    D[chosen[doubt == np.inf]] = np.nan
                    bad[chosen[doubt == np.inf]] = True
            direction.reshape(-1)[k] = 0
            yield np.full_like(outputs, k), outputs, D
        if bad.any():
            warn(
                f"f has no trustworthy derivative with respect to {self._f.name(variable)} at the solution of {bad.sum()} "
                f"samples (first sample {rows[np.flatnonzero(bad)[0]]}): difference quotients of different steps disagree, as at "
                "a kink or in noise; these derivatives are NaN",
                DerivativeWarning,
            )

    def _find_groups(self, Z: Array, rows: Array, variable: int) -> list[Group] | None:
        Z, rows = Z[:4], rows[:4]
        x, per_row = self._f.variable(Z, rows, variable)
        entries = math.prod(self._f.entry_shape(variable))

        def probe(mask: Array) -> Array:
            y = x.copy()
            y.reshape(len(y) if per_row else 1, -1)[:, mask] = np.nan
            return np.isnan(self._f(y, rows) if variable == STATE else self._f(Z, rows, variable, y)).any(axis=0)

        try:
            with silenced(), np.errstate(invalid="ignore"):
                return find_groups(probe, entries, self._f.equation.n, max(FEW, entries // 8))
        except Exception:  # f may not take NaN
            return None

    def _is_complete(self, blocks: list[Block], Z: Array, rows: Array, variable: int) -> bool:
        """Whether the derivatives along a random direction are the sums of those by entries."""
        direction = self.direction(Z, rows, variable)
        total, size = np.zeros(Z.shape), np.zeros(Z.shape)
        for inputs, outputs, D in blocks:
            terms = D * direction.reshape(-1)[inputs]
            total[:, outputs] += terms
            size[:, outputs] += np.abs(terms)
        error = np.abs(total - self.complex_step(Z, rows, variable, direction))
        return bool((error <= 1e-2 * tolerance(Z.dtype) * (size + 1e-8 * size.max(axis=1, keepdims=True))).all())

    def _distances(self, Z: Array, rows: Array, slopes: Array) -> Array:
        """The distances (m,) over which f changes by its terms if the slopes (m, n) are right."""
        F = self._f(Z, rows)
        terms = np.fmax(self._f.terms(Z, rows, F), self._f.terms_of_arguments(Z, rows, F).max(axis=1))
        return np.asarray(terms / np.abs(slopes).max(axis=1).astype(np.float64))

    def _difference(
        self, Z: Array, rows: Array, variable: int, direction: Array, size: Array | None = None
    ) -> tuple[Array, Array]:
        """Richardson's extrapolation of two central differences (m, n), and its uncertainty (m,): how far they differ.

        The uncertainty is infinite where they are not good. Several steps are tried, in units of ``size`` (m,) or of the
        variable, until the uncertainty is small; the best one is used. That f does not change at all is accepted only for a
        step of a few per cent, since a small one may be lost in rounding.
        """
        m, eps = len(rows), float(np.finfo(Z.dtype).eps)
        own, vanishes = self._sizes(Z, rows, variable, direction)
        size = own if size is None else np.where(np.isfinite(size) & (size > own), size, own)
        flat = _FLAT_STEP / eps ** (1 / 3)
        factors = (1.0, 1e-2, flat, 1e2, 1e-4, 1e4, 1e-6, 1e6, *((1e-9, 1e-12, 1e-15, 1e-18, 1e12) if vanishes else ()))
        best, doubt = np.full((m, self._f.equation.n), np.nan), np.full(m, np.inf)
        always_flat, doubtful = np.full(m, True), np.full(m, True)
        center = self._f(Z, rows).astype(np.float64)
        terms = self._f.terms(Z, rows, center)
        for factor in factors:
            left = np.flatnonzero((doubt == np.inf) | (doubtful & best.any(axis=1)))
            if not len(left):
                break
            step = 2.0 ** np.round(np.log2(eps ** (1 / 3) * size[left] * factor))
            found = self._quotients(Z[left], rows[left], variable, direction, step, center[left], terms[left])
            always_flat[left] &= found.flat
            good = np.where(found.flat, always_flat[left] & (factor == flat), found.good)
            good &= found.doubt < doubt[left]
            value = np.where(good[:, None], found.extrapolated, found.fine)
            first = np.isnan(best[left]).all(axis=1)
            best[left[good | first]] = value[good | first]
            doubt[left[good]] = found.doubt[good]
            doubtful = ~(doubt <= self._accuracy(Z) * np.abs(best).max(axis=1))
        # A variable so small that f may lose it in rounding may need a step as large as f allows.
        lost = np.flatnonzero(doubtful & (size < eps**0.5 * terms) & (terms < np.inf))
        if len(lost):
            step = 2.0 ** np.round(np.log2(eps ** (1 / 3) * terms[lost]))
            with np.errstate(all="ignore"):
                found = self._quotients(Z[lost], rows[lost], variable, direction, step, center[lost], terms[lost])
            good = found.good & ~found.flat & (always_flat[lost] | (found.doubt < doubt[lost]))
            best[lost[good]], doubt[lost[good]] = found.extrapolated[good], found.doubt[good]
        # A z that has come close to zero is no measure of steps, about which f may be flat, or rough, because of rounding only.
        if variable == STATE and size is own:
            start = np.abs(self._f.equation.start[rows]).max(axis=1).astype(np.float64)
            lost = np.flatnonzero((always_flat | (doubt == np.inf)) & (size < eps**0.5 * start))
            if len(lost):
                again, doubt_again = self._difference(Z[lost], rows[lost], variable, direction, start[lost])
                better = np.isfinite(doubt_again) & again.any(axis=1)
                best[lost[better]], doubt[lost[better]] = again[better], doubt_again[better]
        return best.astype(Z.dtype), doubt

    @staticmethod
    def _accuracy(Z: Array) -> float:
        """The relative accuracy required of differences."""
        return 2e-2 if Z.dtype == np.float32 else 1e-6

    def _sizes(self, Z: Array, rows: Array, variable: int, direction: Array) -> tuple[Array, bool]:
        """The size (m,) of what moves along a direction, or of the variable or 1 where that is zero, and whether any is."""
        x, per_row = self._f.variable(Z, rows, variable)
        as_rows = (len(rows) if per_row else 1, -1)
        moved, whole = (np.abs(v).reshape(as_rows).max(axis=1).astype(np.float64) for v in (x * direction, x))
        # Smaller numbers are zero, or on their way to it, and no step is a part of them.
        nothing = float(np.finfo(Z.dtype).tiny)
        size = np.where(moved > nothing, moved, np.where(whole > nothing, whole, 1.0))
        return np.broadcast_to(size, len(rows)), not (moved > nothing).all()

    def _quotients(
        self, Z: Array, rows: Array, variable: int, direction: Array, h: Array, center: Array, terms: Array
    ) -> _Quotients:
        """With steps h (m,), from the values (m, n) at Z and the size (m,) of the terms they are sums of."""
        x, per_row = self._f.variable(Z, rows, variable)
        h = h if per_row else np.full_like(h, h.min())
        step = h.reshape(-1, *[1] * (x.ndim - 1)) if per_row else h[0]

        def values(part: float) -> Array:
            return self._shifted(Z, rows, variable, (direction * (part * step)).astype(x.dtype)).astype(np.float64)

        plus, minus, plus2, minus2 = map(values, (1.0, -1.0, 0.5, -0.5))
        coarse, fine = (plus - minus) / (2 * h[:, None]), (plus2 - minus2) / h[:, None]
        bend = np.abs(plus - 2 * center + minus) / h[:, None]
        bend2 = np.abs(plus2 - 2 * center + minus2) / (h[:, None] / 2)
        with np.errstate(over="ignore"):
            noise = float(np.finfo(Z.dtype).eps) * np.fmax(np.abs(plus).max(axis=1), terms) / (h / 2)
        large, most_bent = np.abs(fine).max(axis=1), bend.max(axis=1)
        unequal, kinked = np.abs(coarse - fine).max(axis=1), (bend2 - 0.75 * bend).max(axis=1)
        tol = self._accuracy(Z)
        near = min(100 * tol, _LARGEST_DOUBT) * np.maximum(large, most_bent)
        return _Quotients(
            fine=fine,
            extrapolated=fine + (fine - coarse) / 3,
            doubt=unequal + noise,
            flat=(large == 0) & (np.abs(coarse).max(axis=1) == 0) & (most_bent == 0),
            good=(unequal <= near) & (noise <= near) & (kinked <= tol * large + 4 * noise),
        )

    def _shifted(self, Z: Array, rows: Array, variable: int, shift: Array) -> Array:
        x = self._f.variable(Z, rows, variable)[0]
        return self._f(x + shift, rows) if variable == STATE else self._f(Z, rows, variable, x + shift)


def _along(sizes: Array, largest: float) -> Array:
    """A direction in which entries move in proportion to their sizes, more or less, up to 1."""
    return np.asarray(np.random.default_rng(0).uniform(0.5, 1, sizes.shape) * (sizes / largest))
