"""One problem of few unknowns on plain numbers, with as little as can be around the calls of f.

The steps are those of the methods for batches, which solve the problem from the start wherever the ones of here do not
converge. A root is only believed if the way there shows that the derivatives were right: if each condition became much smaller
than it was, by steps that were to make it zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import hypot, inf, isfinite, log
from operator import add, mul, sub
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from implicit_rnn.engines.base import Equation, JuliaFunction
from implicit_rnn.engines.numpy.sizes import BACKSTEP, RESPONSE, SMALLEST_ROOT_STEP, far_step, is_near, lingers
from implicit_rnn.engines.numpy.solvers import BLOW_UP, decreases
from implicit_rnn.errors import silenced

Array = np.ndarray
Numbers = list[float]

MOST = 16
"""Unknowns beyond which little is won."""
_PROOF, _LAST = 1e-3, 0.1
"""What is left of each condition, and of all of them after the last step, where derivatives have proved right."""
_STEP = 1e-200
_EPS, _TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)

_takes_complex: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Whether functions, by their code, take complex numbers without a warning."""


class Found(NamedTuple):
    """A solution, and how it was found."""

    z: Numbers
    evaluations: int
    residual: float
    rate: float


class UncertainError(Exception):
    """What f returns is to be looked at with more care than here."""


def picard(equation: Equation, tol: float, limit: int, block: int, patience: float) -> Found | None:
    """A fixed point, looked for after 1, 5 and so on evaluations; None where it is not found.

    From ``block`` evaluations on it is given up if at its rate it would take more than ``patience``. Raises ``UncertainError``.
    """
    calls = _Calls(equation)
    size, floor = _size(equation)
    z = equation.start[0].tolist()
    largest, before, evaluations = 0.0, inf, 0
    while True:
        steps = 4 if evaluations else 1
        evaluations += steps
        if evaluations >= limit:
            return None
        for _ in range(steps - 1):
            z = calls.real(z)
        F = calls.real(z)
        residual, here = size([*map(sub, F, z)]), size(F)
        largest = max(largest, here)
        if evaluations == 1:
            outset = max(size(z), here)
        if not residual <= BLOW_UP * outset:
            return None
        rate = (residual / before) ** (1 / steps) if before < inf else 0.0
        reference = max(here, floor, _EPS * largest / tol)
        if is_near(residual, max(here, floor), tol, _EPS * largest, rate >= 1):
            # Undamped iteration ends at what attracts it, unless it starts there.
            return Found(z, evaluations, residual / reference if residual else 0.0, rate) if evaluations > 1 else None
        if lingers(residual, _EPS * largest, _EPS, rate, False):
            return None
        slow = log(tol) + log(max(reference, _TINY)) - log(residual) < patience * min(log(rate or _TINY), -_TINY)
        if evaluations >= block and slow:
            return None
        z, before = F, residual


def newton(equation: Equation, tol: float, limit: int) -> Found | None:
    """A root, or None where it is not found. Raises ``UncertainError``."""
    calls = _Calls(equation)
    size, floor = _size(equation)
    if calls.jac is None:
        calls.prepare_slopes(equation.start[0])
    z = equation.start[0].tolist()
    c = calls.value(z)
    merit, seen = hypot(*c), [c]
    start = z
    evaluations, largest, last, before, looked, t = 1, 0.0, inf, inf, False, 1.0
    while True:
        step = calls.newton_step(z, c)
        here, length = size(z), size(step)
        if not isfinite(merit + length + here):
            return None
        if here > largest:
            largest = here
        rate = length / (last or 1.0) if last < inf else 0.0
        rounding = _EPS * largest
        if is_near(length, here if here > floor else floor, tol, rounding, False):
            if calls.complex_only and not looked:
                c, looked = calls.real(z), True
                merit = hypot(*c)
                continue
            if t < 1 or merit > _LAST * before or not _has_vanished(c, seen):
                return None
            if far_step(tol) * largest < last < inf and not _responds(calls, z, start, c):
                return None
            residual = length / max(here, floor, rounding / tol) if length else 0.0
            return Found([*map(add, z, step)], evaluations, residual, rate)
        if looked or lingers(length, rounding, _EPS, rate, evaluations >= limit):
            return None
        last, before, start, t = length, merit, z, 1.0
        while True:
            if evaluations >= limit or t < SMALLEST_ROOT_STEP:
                return None
            z = [a + t * b for a, b in zip(start, step)]  # noqa: B905 as fast as can be
            c = calls.value(z)
            merit = hypot(*c)
            evaluations += 1
            if decreases(merit, before, t):
                break
            t /= 2
        seen.append(c)


def _responds(calls: _Calls, z: Numbers, base: Numbers, c: Numbers) -> bool:
    """Whether f changes about as its derivatives say on the way back from a root that was suddenly there, see ``Root``."""
    there = [a + BACKSTEP * (b - a) for a, b in zip(z, base, strict=True)]
    found = calls.newton_step(z, [*map(sub, c, calls.real(there))])
    return all(
        abs(b - a) <= RESPONSE * abs(x) <= RESPONSE**2 * abs(b - a) for a, b, x in zip(z, there, found, strict=True)
    )


def _size(equation: Equation) -> tuple[Callable[[Numbers], float], float]:
    """The size of z, in units of the scale where there is one, and a floor under it."""
    if equation.scale is None:
        return lambda z: hypot(*z), 0.0
    weights = (1 / equation.scale).tolist()
    return lambda z: hypot(*map(mul, z, weights)), equation.n**0.5


def _has_vanished(c: Numbers, seen: list[Numbers]) -> bool:
    """Whether each condition is much smaller than it was on the way."""
    return all(abs(x) <= _PROOF * max(map(abs, way)) for x, way in zip(c, zip(*seen, strict=True), strict=True))


class _Calls:
    """f and its Jacobian at plain numbers; ``UncertainError`` for what has to be named with care.

    A single unknown has the value of f and its slope from one complex number, ``complex_only`` until f is seen to be as small
    for the real one.
    """

    def __init__(self, equation: Equation) -> None:
        assert not isinstance(equation.f, JuliaFunction)
        self.f, self.jac, self.n, self.args = equation.f, equation.jac, equation.n, equation.args
        self.posed: Callable[[Array], Any] = lambda z: z
        self.shape: tuple[int, ...] = (self.n,)
        if not equation.shape:
            self.posed = lambda z: z[0]
        elif equation.vectorized and len(equation.shape) == 2:
            self.posed, self.shape = _as_row, (1, self.n)
        if True in equation.batched and self.posed is not _as_row:
            self.args = tuple(a[0] if own else a for a, own in zip(equation.args, equation.batched, strict=True))
        self.complex = self.complex_only = False
        self.slope = 0.0

    def prepare_slopes(self, start: Array) -> None:
        """See whether the complex step is to be tried, which is remembered of a function."""
        key = getattr(self.f, "__code__", self.f)
        try:
            known = _takes_complex.get(key)
            if known is None:
                known = _takes_complex[key] = self._try_complex(start)
        except TypeError:  # no weak reference
            known = self._try_complex(start)
        self.complex, self.complex_only = known, known and self.n == 1

    def _try_complex(self, start: Array) -> bool:
        try:
            with silenced(), warnings.catch_warnings():
                warnings.simplefilter("error")
                return np.asarray(self.f(self.posed(start + 1j * _STEP), *self.args)).dtype.kind == "c"
        except Exception:
            return False

    def value(self, z: Numbers) -> Numbers:
        """f at z, its real part at z + ih while that is to do."""
        if not self.complex_only:
            return self.real(z)
        y = self._moved([complex(z[0], _STEP)]).item()
        self.slope = y.imag / _STEP
        return [y.real]

    def real(self, z: Numbers) -> Numbers:
        """f, which has to be real."""
        try:
            y = self.f(self.posed(np.array(z)), *self.args)
        except (ArithmeticError, ValueError):  # perhaps outside the domain of f
            raise UncertainError from None
        if type(y) is not np.ndarray:
            try:
                y = np.asarray(None if isinstance(y, (tuple, np.ma.MaskedArray)) else y)
            except ValueError:
                raise UncertainError from None
        if y.dtype.kind not in "fiu" or y.dtype.itemsize > 8 or not self._fits(y):
            raise UncertainError
        return [float(y.item())] if self.n == 1 else y.reshape(-1).tolist()

    def _moved(self, z: list[Any]) -> Array:
        """f at complex numbers."""
        try:
            y = self.f(self.posed(np.array(z)), *self.args)
        except Exception:
            raise UncertainError from None
        if type(y) is not np.ndarray:
            y = np.asarray(y)
        if y.dtype.kind != "c" or y.dtype.itemsize > 16 or not self._fits(y):
            raise UncertainError
        return y

    def _fits(self, y: Array) -> bool:
        return y.shape == self.shape or (not y.shape and self.shape == (1,))

    def newton_step(self, z: Numbers, c: Numbers) -> Numbers:
        """-J⁻¹ c; ``UncertainError`` where it does not exist."""
        if self.n == 1:
            if not self.complex_only:
                self.slope = self._column(z, 0)[0] if self.jac is None else float(self._given(z)[0, 0])
            if self.slope == 0:
                raise UncertainError
            return [-c[0] / self.slope]
        J = np.array([self._column(z, k) for k in range(self.n)]).T if self.jac is None else self._given(z)
        try:
            return np.linalg.solve(J, -np.array(c)).tolist()
        except np.linalg.LinAlgError:
            raise UncertainError from None

    def _column(self, z: Numbers, k: int) -> Numbers:
        """∂f/∂z_k by the complex step, else by a central difference."""
        if self.complex:
            moved: list[Any] = z.copy()
            moved[k] = complex(z[k], _STEP)
            return (self._moved(moved).imag / _STEP).reshape(-1).tolist()
        h = 2.0**-17 * (abs(z[k]) or hypot(*z) or 1.0)
        above, below = z.copy(), z.copy()
        above[k], below[k] = z[k] + h, z[k] - h
        return [(a - b) / (above[k] - below[k]) for a, b in zip(self.real(above), self.real(below), strict=True)]

    def _given(self, z: Numbers) -> Array:
        assert self.jac is not None
        J = np.asarray(self.jac(self.posed(np.array(z)), *self.args))
        if J.size != self.n**2 or J.dtype.kind not in "fiub" or (self.n > 1 and J.shape[-2:] != (self.n, self.n)):
            raise UncertainError
        return J.reshape(self.n, self.n).astype(np.float64, copy=False)


def _as_row(z: Array) -> Array:
    return z[None]
