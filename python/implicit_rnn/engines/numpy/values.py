"""The values of a Python function, sample by sample or all at once, as the equation was posed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from implicit_rnn.engines.base import Equation

Array = np.ndarray

_OUTSIDE = re.compile(r"math domain error$|expected a [^,]*, got -?[\d.einf+-]+$")
"""What ``math.log(-1)`` says, before Python 3.14 and since."""

STATE = -1
"""The variable z among the arguments 0, 1, …"""


class Values:
    """The function of an equation: it is given a copy of z, and read-only arguments; its result is copied,
    so that it may reuse its memory.

    Z (m, n) are iterates of the samples ``rows`` (m,).
    """

    def __init__(self, equation: Equation) -> None:
        self.equation = equation
        self._found = False
        """Whether f has had a value."""

    def __call__(self, Z: Array, rows: Array, variable: int = STATE, value: Array | None = None) -> Array:
        """f (m, n); the argument ``variable`` may have another ``value``."""
        equation = self.equation
        assert callable(equation.f)
        if not len(Z):
            return Z.copy()
        args = self.arguments(rows, variable, value)
        if self.takes_all:
            return self._of_many(equation.f, Z, args)
        return np.stack([self._of_one(equation.f, z, own) for z, own in self.each(Z, args)])

    def real(self, Z: Array, rows: Array) -> Array:
        """f for real z, where it must be real."""
        F = self(Z, rows)
        if F.dtype.kind == "c":
            raise TypeError(f"f returned an array of dtype {F.dtype} for real input; expected real numbers")
        return F

    @property
    def takes_all(self) -> bool:
        """Whether f is given many samples at once."""
        return self.equation.vectorized and not self.equation.single

    def arguments(self, rows: Array, variable: int = STATE, value: Array | None = None) -> list[Array]:
        """The arguments of the samples, batched ones row by row."""
        equation = self.equation
        args = [_rows(a, rows) if batched else a for a, batched in zip(equation.args, equation.batched, strict=True)]
        if value is not None:
            args[variable] = value
        return args

    def each(self, Z: Array, args: list[Array]) -> Iterator[tuple[Array, list[Array]]]:
        """Each sample with its arguments."""
        for k, z in enumerate(Z):
            yield z, [a[k] if batched else a for a, batched in zip(args, self.equation.batched, strict=True)]

    def as_posed(self, z: Array) -> Any:
        """A copy of z (n,) in the form in which it was posed."""
        return z.copy() if self.equation.shape else z[0]

    def variable(self, Z: Array, rows: Array, variable: int) -> tuple[Array, bool]:
        """Its values, and whether each row has its own."""
        if variable == STATE:
            return Z, True
        argument = self.equation.args[variable]
        return (_rows(argument, rows), True) if self.equation.batched[variable] else (argument, False)

    def name(self, variable: int) -> str:
        """The name of a variable."""
        return "z" if variable == STATE else self.equation.names[variable]

    def entry_shape(self, variable: int) -> tuple[int, ...]:
        """The shape of a variable as one sample sees it."""
        return (self.equation.n,) if variable == STATE else self.equation.entry_shape(variable)

    def terms(self, Z: Array, rows: Array, F: Array) -> Array:
        """The size (m,) of the terms of f, whose rounding errors it inherits even where large terms cancel."""
        perturbation = Z.dtype.type(2.0**-10)
        return np.asarray(np.fmax(np.abs(F), np.abs(self(Z + perturbation * Z, rows) - F) / perturbation).max(axis=1))

    def terms_of_arguments(self, Z: Array, rows: Array, F: Array) -> Array:
        """The largest (m, n) of the terms of f due to each floating-point argument."""
        perturbation, terms = Z.dtype.type(2.0**-10), np.zeros_like(F)
        for index in range(len(self.equation.args)):
            if self.equation.is_differentiable(index):
                x = self.variable(Z, rows, index)[0]
                moved = np.abs(self(Z, rows, index, x + perturbation * x) - F) / perturbation
                terms = np.fmax(terms, np.where(np.isfinite(moved), moved, 0))
        return terms

    def check_separate(self, Z: Array) -> None:
        """``ValueError`` if f returns a different value for a sample among others than alone; Z (B, n) are all samples.

        Such samples are one coupled equation, whose Jacobian is not that of each sample.
        """
        if not self.takes_all:
            return
        finite = np.flatnonzero(np.isfinite(Z).all(axis=1))
        if len(finite) < 2:
            return
        farthest = int(np.abs(Z[finite] - Z[finite[0]]).max(axis=1).argmax())
        rows = finite[[0, farthest or -1]]
        beside = self(Z[rows], rows)
        for k, other in ((0, 1), (1, 0)):
            one, z = rows[[k]], Z[rows[[k]]]
            alone = self(z, one)
            error = np.abs(beside[k] - alone[0])
            if error.any() and error.max() > tolerance(Z.dtype) * self.terms(z, one, alone)[0]:
                i = int(error.argmax())
                raise ValueError(
                    f"f mixes samples, or is another at each call: entry {i} of sample {rows[k]} is {beside[k, i]:.9g} beside "
                    f"sample {rows[other]} and {alone[0, i]:.9g} alone; with vectorized=True a row of f may depend on the same "
                    "row of z and of batched arguments only. Solve what is coupled as one sample, z0 (n,)"
                )

    def _of_one(self, f: Callable[..., Any], z: Array, args: list[Array]) -> Array:
        """NaN where the functions of ``math`` throw, unless they do so at once."""
        try:
            value = self._checked(f(self.as_posed(z), *args), z.shape)
        except (ArithmeticError, ValueError) as error:
            if self._found and (isinstance(error, ArithmeticError) or _OUTSIDE.match(str(error))):
                return np.full_like(z, np.nan)
            raise
        self._found = True
        return value

    def _of_many(self, f: Callable[..., Any], Z: Array, args: list[Array]) -> Array:
        samples = self.equation.samples
        try:
            return self._checked(f(Z.copy(), *args), Z.shape)
        except ValueError as error:
            if len(Z) == samples:
                raise
            raise ValueError(
                f"f fails for {len(Z)} of the {samples} samples: {error}. With vectorized=True it is given any number of them: "
                "what belongs to each goes into args and is named in batched"
            ) from error

    def _checked(self, y: object, shape: tuple[int, ...]) -> Array:
        if y is None or isinstance(y, tuple):
            came = "None" if y is None else f"a tuple of {len(y)}"
            raise TypeError(f"f returned {came}; expected one array of shape {shape}, like z")
        if isinstance(y, np.ma.MaskedArray):
            y = np.ma.filled(y * 1.0, np.nan)  # f has no value there
        try:
            array = np.asarray(y)
        except ValueError as error:
            raise TypeError(f"f returned what cannot be read as an array: {error}") from None
        if array.shape == () and shape == (1,):
            array = array.reshape(1)  # one unknown may be answered by a number
        if array.shape != shape:
            whole = array.shape == self.equation.shape  # the unknowns form a matrix
            hint = (
                f": each row of z0 {array.shape} is one sample; pass unknowns of two axes as z0.ravel()"
                if whole
                else ""
            )
            raise ValueError(f"f returned an array of shape {array.shape}; expected {shape}, the shape of z{hint}")
        if array.dtype.kind not in "iufc":
            raise TypeError(f"f returned an array of dtype {array.dtype}; expected real numbers")
        return np.array(array, None if array.dtype.kind == "c" else self.equation.start.dtype)


def _rows(argument: Array, rows: Array) -> Array:
    own = argument.take(rows, 0)
    own.flags.writeable = False  # as those are that samples share
    return own


def tolerance(dtype: np.dtype) -> float:
    """The allowed deviation of a derivative, or another value, from the values of f, relative to the sum of term sizes."""
    return 1e-3 if dtype == np.float32 else 1e-6
