"""The Python function of an equation: its values, and its derivatives by hooks, the complex step or difference quotients.

Derivatives are never believed without a look at the values of f: the complex step and the hooks ``jac`` and ``vjp`` are
compared with difference quotients along one direction, and difference quotients with those of another step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from implicit_rnn.engines import base
from implicit_rnn.engines.base import LARGE
from implicit_rnn.engines.numpy.linear import Operator
from implicit_rnn.engines.numpy.sparsity import Group, find_groups
from implicit_rnn.errors import DerivativeWarning, warn

Array = np.ndarray
Block = tuple[Array, Array, Array]
"""Entries of a variable, the outputs that depend on them, and the derivatives (m, len(outputs)) of the second by the first."""

STATE = -1
"""The variable z among the arguments 0, 1, …"""

_FEW = 128
"""Entries of a variable up to which each is moved for itself, and unknowns up to which all Jacobians are dense."""

_FLAT_FACTOR = 1e4
"""The step, in units of the best one for a function of scale 1, at which an f that does not change is believed to be flat."""


class Function:
    """The function of an equation: it is given copies and what it returns is copied, so that it may reuse its memory.

    Z (m, n) are iterates of the samples ``rows`` (m,).
    """

    def __init__(self, equation: base.Equation) -> None:
        self.equation = equation
        self._analytic: dict[int, Array] = {}
        self._groups: dict[int, list[Group] | None] = {}
        self._hook_checked = np.zeros(equation.samples, bool)
        self._large: bool | None = None

    def is_large(self) -> bool:
        """Whether the Jacobian of a sample is an ``Operator`` rather than a dense matrix."""
        equation = self.equation
        if self._large is None:
            self._large = equation.n > LARGE
            if _FEW < equation.n <= LARGE and (equation.jac or equation.vjp):
                self._large = equation.jac is None or _is_sparse(self._given(equation.start[:1], np.array([0]))[0])
        return self._large

    # --- values ----------------------------------------------------------------------------------------------

    def __call__(self, Z: Array, rows: Array, variable: int = STATE, value: Array | None = None) -> Array:
        """f (m, n); the argument ``variable`` may have another ``value``."""
        equation = self.equation
        assert callable(equation.f)
        if not len(Z):
            return Z.copy()
        args = self._arguments(rows, variable, value)
        if self._takes_all:
            return self._checked(equation.f(Z.copy(), *args), Z.shape)
        return np.stack([self._checked(equation.f(self._own(z), *own), z.shape) for z, own in self._each(Z, args)])

    def real(self, Z: Array, rows: Array) -> Array:
        """f for real z, of which it has to be real."""
        F = self(Z, rows)
        if F.dtype.kind == "c":
            raise TypeError(f"f returned an array of dtype {F.dtype} for real input; expected real numbers")
        return F

    def check_separate(self, Z: Array) -> None:
        """``ValueError`` where f gives a sample another value beside others than alone; Z (B, n) are all samples.

        Such samples are one equation, whose Jacobian is not that of each.
        """
        if not self._takes_all:
            return
        finite = np.flatnonzero(np.isfinite(Z).all(axis=1))
        if len(finite) < 2:
            return
        farthest = int(np.abs(Z[finite] - Z[finite[0]]).max(axis=1).argmax())
        rows = finite[[0, farthest or -1]]
        one, z = rows[:1], Z[rows[:1]]
        beside, alone = self(Z[rows], rows)[0], self(z, one)
        error = np.abs(beside - alone[0])
        if error.any() and error.max() > _tolerance(Z.dtype) * self._terms(z, one, alone)[0]:
            i = int(error.argmax())
            raise ValueError(
                f"f mixes samples, or is another at each call: entry {i} of sample {rows[0]} is {beside[i]:.9g} beside sample "
                f"{rows[1]} and {alone[0, i]:.9g} alone; with vectorized=True a row of f may depend on the same row of z and of "
                "batched arguments only. Solve what is coupled as one sample, z0 (n,)"
            )

    def conditions(self, F: Array, Z: Array) -> Array:
        """c = f(z) - z, or c = f(z) of a root."""
        return F if self.equation.root else F - Z

    @property
    def _takes_all(self) -> bool:
        return self.equation.vectorized and not self.equation.single

    def _arguments(self, rows: Array, variable: int = STATE, value: Array | None = None) -> list[Array]:
        """The arguments of the samples, batched ones row by row."""
        equation = self.equation
        args = [a[rows] if batched else a for a, batched in zip(equation.args, equation.batched, strict=True)]
        if value is not None:
            args[variable] = value
        return args

    def _each(self, Z: Array, args: list[Array]) -> Iterator[tuple[Array, list[Array]]]:
        for k, z in enumerate(Z):
            yield z, [a[k] if batched else a for a, batched in zip(args, self.equation.batched, strict=True)]

    def _own(self, z: Array) -> Any:
        """A copy of z (n,) in the form in which it was posed."""
        return z.copy() if self.equation.shape else z[0]

    def _checked(self, y: object, shape: tuple[int, ...]) -> Array:
        if isinstance(y, tuple):
            raise TypeError(f"f returned a tuple of {len(y)}; expected one array of shape {shape}, like z")
        array = np.asarray(y)
        if array.shape == () and shape == (1,):
            array = array.reshape(1)  # one unknown may be answered by a number
        if array.shape != shape:
            raise ValueError(f"f returned an array of shape {array.shape}; expected {shape}, the shape of z")
        if array.dtype.kind not in "biufc":
            raise TypeError(f"f returned an array of dtype {array.dtype}; expected real numbers")
        return np.array(array, None if array.dtype.kind == "c" else self.equation.start.dtype)

    # --- the Jacobian with respect to z ----------------------------------------------------------------------

    def conditions_jacobian(self, Z: Array, rows: Array, certain: bool = False) -> Array:
        """A = ∂c/∂z (m, n, n)."""
        J = self.jacobian(Z, rows, certain)
        return J if self.equation.root else J - np.eye(self.equation.n, dtype=J.dtype)

    def jacobian(self, Z: Array, rows: Array, certain: bool = False) -> Array:
        """∂f/∂z (m, n, n)."""
        equation, n = self.equation, self.equation.n
        if not len(rows):
            return np.empty((0, n, n), Z.dtype)
        if equation.jac is not None or equation.vjp is not None:
            matrices = self._given(Z, rows) if equation.jac is not None else self._rows_of_products(Z, rows)
            J = np.stack([m.toarray() if _is_sparse(m) else m for m in matrices]).astype(Z.dtype)
            direction = self._direction(Z, rows, STATE)
            self._check_jacobian(J @ direction, np.abs(J) @ np.abs(direction), direction, Z, rows, certain)
            return J
        J = np.zeros((len(rows), n, n), Z.dtype)
        for inputs, outputs, D in self.derivatives(Z, rows, STATE, certain):
            J[:, outputs, inputs] = D
        return J

    def operator(self, z: Array, row: int, certain: bool = False) -> Operator:
        """A = ∂c/∂z of one sample with many unknowns at z (n,), without a dense matrix unless ``jac`` gives one."""
        equation, rows, Z = self.equation, np.array([row]), z[None]
        matrix: Any | None = None
        transposed: Callable[[Array], Array] | None = None
        if equation.jac is not None:
            matrix = self._given(Z, rows)[0]
            direction = self._direction(Z, rows, STATE)
            products = (matrix @ direction)[None], (abs(matrix) @ abs(direction))[None]
            self._check_jacobian(*products, direction, Z, rows, certain)
        elif equation.vjp is not None:

            def transposed(v: Array) -> Array:
                return self.products(v[None].astype(z.dtype), Z, rows)[0][0]
        else:
            matrix = self._sparse_jacobian(Z, rows, certain)
        analytic = matrix is None and bool(self._is_analytic(Z, rows, STATE, certain)[0])

        def product(d: Array) -> Array:
            unit = np.abs(d).max()
            if unit == 0:
                return np.zeros_like(z)
            d = (d / unit).astype(z.dtype)
            return unit * (self._complex_step if analytic else self._quotient)(Z, rows, STATE, d)[0]

        tol = 1e-4 if z.dtype == np.float32 else 1e-10
        product_tol = tol if analytic or matrix is not None else max(tol, 1e-6)
        make = None if equation.n > LARGE else lambda: np.asarray(self.jacobian(Z, rows)[0], np.float64)
        return Operator(equation.n, 0 if equation.root else 1, product, transposed, matrix, make, tol, product_tol)

    def _sparse_jacobian(self, Z: Array, rows: Array, certain: bool) -> Any | None:
        """∂f/∂z of one sample where few of its unknowns are coupled."""
        from scipy import sparse

        if not self._is_analytic(Z, rows, STATE, certain).all():
            return None
        blocks = self._grouped(Z, rows, STATE, certain)
        if blocks is None:
            return None
        none = np.empty(0, np.int64)
        inputs, outputs = (np.concatenate([none, *(block[part] for block in blocks)]) for part in (0, 1))
        values = np.concatenate([np.empty(0, Z.dtype), *(D[0] for *_, D in blocks)])
        return sparse.csc_matrix((values, (outputs, inputs)), (self.equation.n, self.equation.n))

    def _given(self, Z: Array, rows: Array) -> Any:
        """What ``jac`` gives for each sample, (n, n) each."""
        n, jac = self.equation.n, self.equation.jac
        assert jac is not None
        args = self._arguments(rows)
        if self._takes_all:
            return self._checked_given("jac", jac(Z.copy(), *args), (len(rows), n, n))
        given = (jac(self._own(z), *own) for z, own in self._each(Z, args))
        return [J if _is_sparse(J) and J.shape == (n, n) else self._checked_given("jac", J, (n, n)) for J in given]

    def _checked_given(self, hook: str, value: Any, shape: tuple[int, ...]) -> Array:
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.array(None)
        if array.size == 1 and np.prod(shape) == 1 and array.ndim < len(shape):
            array = array.reshape(shape)  # one unknown may be answered by a number
        if array.shape != shape or array.dtype.kind not in "biuf":
            came = f"a {type(value).__name__}" if array.dtype.kind == "O" else f"an array of {array.dtype}"
            raise ValueError(
                f"{hook} returned {came} of shape {getattr(value, 'shape', array.shape)}; expected real numbers of shape {shape}"
            )
        return np.array(array, self.equation.start.dtype)

    def _rows_of_products(self, Z: Array, rows: Array) -> Array:
        J = np.empty((len(rows), self.equation.n, self.equation.n), Z.dtype)
        for k in range(self.equation.n):
            J[:, k] = self.products(np.eye(1, self.equation.n, k, Z.dtype).repeat(len(rows), axis=0), Z, rows)[0]
        return J

    # --- products with the Jacobians by the hook vjp ---------------------------------------------------------

    def products(self, V: Array, Z: Array, rows: Array) -> list[Any]:
        """What ``vjp`` gives for V (m, n): the products for z and each argument, shared ones summed, None where it has none."""
        equation, vjp = self.equation, self.equation.vjp
        assert vjp is not None
        args = self._arguments(rows)
        if self._takes_all:
            return self._checked_products(vjp(V.copy(), Z.copy(), *args), Z, args)
        parts = [
            self._checked_products(vjp(self._own(v), self._own(z), *own), self._own(z), own)
            for v, (z, own) in zip(V, self._each(Z, args), strict=True)
        ]
        found: list[Any] = []
        for own, of_rows in zip((True, *equation.batched), zip(*parts, strict=True), strict=True):
            given = all(w is not None for w in of_rows)
            found.append((np.stack(of_rows) if own else np.sum(of_rows, axis=0)) if given else None)
        found[0] = found[0].reshape(Z.shape)
        return found

    def _checked_products(self, products: Any, z: Any, args: list[Array]) -> list[Any]:
        names = ("z", *self.equation.names)
        if not isinstance(products, (tuple, list)) or len(products) != len(names):
            came = (
                f"{len(products)} products" if isinstance(products, (tuple, list)) else f"a {type(products).__name__}"
            )
            raise ValueError(f"vjp returned {came}; expected a tuple of {len(names)}, for {', '.join(names)}")
        if products[0] is None:
            raise ValueError("vjp returned None for z; expected v times ∂f/∂z")
        return [
            None if w is None or (k and args[k - 1].dtype.kind != "f") else self._checked_product(names[k], w, x)
            for k, (w, x) in enumerate(zip(products, (z, *args), strict=True))
        ]

    def _checked_product(self, name: str, w: Any, x: Any) -> Array:
        array, shape = np.asarray(w), np.shape(x)
        if array.size == 1 and np.size(x) == 1:
            array = array.reshape(shape)
        if array.shape != shape or array.dtype.kind not in "biuf":
            raise ValueError(
                f"vjp returned for {name} an array of {array.dtype} of shape {array.shape}; expected real numbers of shape "
                f"{shape}, that of {name}"
            )
        return np.array(array, self.equation.start.dtype)

    def argument_jacobian(self, Z: Array, rows: Array, index: int) -> Array:
        """∂f/∂argument (m, n, entries) at solutions."""
        equation = self.equation
        if equation.vjp is not None and (B := self._argument_jacobian_of_products(Z, rows, index)) is not None:
            return B
        B = np.zeros((len(rows), equation.n, equation.entries(index)), Z.dtype)
        for inputs, outputs, D in self.derivatives(Z, rows, index, certain=True):
            B[:, outputs, inputs] = D
        return B

    def _argument_jacobian_of_products(self, Z: Array, rows: Array, index: int) -> Array | None:
        """The same, a row at a time, by ``vjp``, if it has products for the argument."""
        n, count = self.equation.n, len(self.equation.args)
        B = np.empty((len(rows), n, self.equation.entries(index)), Z.dtype)
        weights = np.random.default_rng(0).uniform(0.5, 1, (1, n)).astype(Z.dtype)
        for k, (z, row) in enumerate(zip(Z[:, None], rows[:, None], strict=True)):
            for i in range(n):
                w = self.products(np.eye(1, n, i, Z.dtype), z, row)[index + 1]
                if w is None:
                    return None
                B[k, i] = w.reshape(-1)
            products: list[Any] = [None] * (1 + count)
            products[index + 1] = (weights @ B[k]).reshape(np.shape(w))
            self.check_products(weights, products, z, row)
        return B

    # --- hooks against the values of f -----------------------------------------------------------------------

    def _check_jacobian(
        self, products: Array, sizes: Array, direction: Array, Z: Array, rows: Array, certain: bool
    ) -> None:
        """``ValueError`` where ∂f/∂z times a direction, of terms that add up to ``sizes``, is not what the values of f say.

        It is looked at where the iteration begins and, if it is to be ``certain``, at each Z.
        """
        new = np.flatnonzero(~self._hook_checked[rows] | certain)
        if not len(new):
            return
        self._hook_checked[rows[new]] = True
        hook = "vjp" if self.equation.jac is None else "jac"
        D, analytic, doubt = self._directional(Z[new], rows[new], STATE, direction)
        largest = sizes[new].max(axis=1, keepdims=True)
        floor = np.where(analytic[:, None], 30 * np.finfo(Z.dtype).eps, _tolerance(Z.dtype)) * largest
        allowed = _tolerance(Z.dtype) * sizes[new] + floor
        self._compare(hook, "z", products[new], D, allowed + 10 * doubt[:, None], rows[new], certain)

    def check_products(self, V: Array, products: list[Any], Z: Array, rows: Array) -> None:
        """``ValueError`` where what ``vjp`` gave, of z or an argument, is not what the values of f say along a direction."""
        for variable, w in enumerate(products, STATE):
            if w is None:
                continue
            name = "z" if variable == STATE else self.equation.names[variable]
            direction = self._direction(Z, rows, variable)
            D, _, doubt = self._directional(Z, rows, variable, direction)
            terms, expected = w * direction, V * D
            own = variable == STATE or self.equation.batched[variable]
            count = len(rows) if own else 1
            got, size = (part.reshape(count, -1).sum(axis=1) for part in (terms, np.abs(terms)))
            want, most, doubts = (
                part.reshape(count, -1).sum(axis=1) for part in (expected, np.abs(expected), np.abs(V) * doubt[:, None])
            )
            allowed = _tolerance(Z.dtype) * (size + 1e-6 * most) + 10 * doubts
            self._compare("vjp", name, got[:, None], want[:, None], allowed[:, None], rows[:count], True)

    def _compare(
        self, hook: str, name: str, got: Array, expected: Array, allowed: Array, rows: Array, certain: bool
    ) -> None:
        known = np.isfinite(allowed).all(axis=1) & np.isfinite(expected).all(axis=1)
        if certain and not np.isfinite(got).all():
            raise ValueError(f"{hook} returned NaN or infinity for {name} at the solution, where f has a value")
        error = np.abs(got - expected)
        wrong = known & (error > allowed).any(axis=1)
        if wrong.any():
            k = int(np.flatnonzero(wrong)[0])
            i = int(np.argmax(error[k] / np.maximum(allowed[k], np.finfo(np.float64).tiny)))
            relative = error[k, i] / max(abs(expected[k, i]), abs(got[k, i]))
            where = "" if self.equation.single else f" of sample {rows[k]}"
            of = f" in entry {i}" if hook == "jac" else ""
            raise ValueError(
                f"{hook} contradicts f: with respect to {name}, along a random direction at {'the solution' if certain else 'z0'}"
                f"{where}, it gives {got[k, i]:.9g}{of} where the values of f give {expected[k, i]:.9g}, a difference of "
                f"{relative:.2g} relative"
            )
        if certain and not known.all():
            warn(
                f"{hook} could not be compared with f at the solution of {(~known).sum()} samples (first sample "
                f"{rows[np.flatnonzero(~known)[0]]}), where difference quotients of different steps disagree, as at a kink; it "
                "is used as it is",
                DerivativeWarning,
            )

    # --- derivatives from values of f ------------------------------------------------------------------------

    def derivatives(self, Z: Array, rows: Array, variable: int, certain: bool = False) -> Iterable[Block]:
        """∂f/∂x for all entries x of a variable as one sample sees it.

        By the complex step for rows on which it agrees with a difference quotient, else by difference quotients, of which
        those of one step and of half of it have to agree. If it is to be ``certain``, each row is examined at this Z, and
        rows without a trustworthy derivative are NaN and warned of; otherwise what was found at the first Z counts, and
        their best quotient serves. Entries that share no output are moved together.
        """
        if not len(rows):
            return []
        analytic = self._is_analytic(Z, rows, variable, certain)
        grouped = self._grouped(Z, rows, variable, certain) if analytic.all() else None
        return self._one_by_one(Z, rows, variable, certain, analytic) if grouped is None else grouped

    def _is_analytic(self, Z: Array, rows: Array, variable: int, certain: bool) -> Array:
        """Whether the complex step serves for these rows, at this Z if that is to be ``certain``, else at the first."""
        known = self._analytic.get(variable)
        if certain or known is None:
            known = np.zeros(self.equation.samples, bool) if known is None else known
            known[rows] = self._directional(Z, rows, variable, self._direction(Z, rows, variable))[1]
            self._analytic[variable] = known
        return known[rows]

    def _one_by_one(self, Z: Array, rows: Array, variable: int, certain: bool, analytic: Array) -> Iterator[Block]:
        x, per_row = self._variable(Z, rows, variable)
        entries = x.shape[1:] if per_row else x.shape
        outputs = np.arange(self.equation.n)
        bad = np.zeros(len(rows), bool)
        direction = np.zeros(entries, x.dtype)
        for k in range(direction.size):
            direction.reshape(-1)[k] = 1
            D = np.empty((len(rows), self.equation.n), Z.dtype)
            if analytic.any():
                chosen = np.flatnonzero(analytic)
                D[chosen] = self._complex_step(Z[chosen], rows[chosen], variable, direction)
            if not analytic.all():
                chosen = np.flatnonzero(~analytic)
                D[chosen], doubt = self._difference(Z[chosen], rows[chosen], variable, direction)
                if certain:
                    D[chosen[doubt == np.inf]] = np.nan
                    bad[chosen[doubt == np.inf]] = True
            direction.reshape(-1)[k] = 0
            yield np.full_like(outputs, k), outputs, D
        if bad.any():
            name = "z" if variable == STATE else self.equation.names[variable]
            warn(
                f"f has no trustworthy derivative with respect to {name} at the solution of {bad.sum()} samples (first sample "
                f"{rows[np.flatnonzero(bad)[0]]}): difference quotients of different steps disagree, as at a kink or in noise; "
                "these derivatives are NaN",
                DerivativeWarning,
            )

    def _grouped(self, Z: Array, rows: Array, variable: int, certain: bool) -> list[Block] | None:
        """The derivatives with respect to many entries by complex steps of groups of them, if there are few groups."""
        x, per_row = self._variable(Z, rows, variable)
        entries = x.shape[1:] if per_row else x.shape
        if np.prod(entries, dtype=np.int64) <= _FEW:
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
                direction = np.zeros(entries, x.dtype)
                direction.reshape(-1)[group.inputs] = 1
                D = self._complex_step(Z, rows, variable, direction)[:, group.outputs]
                blocks.append((group.inputs, group.outputs, D))
            if not (new or certain) or self._is_complete(blocks, Z, rows, variable):
                return blocks
        self._groups[variable] = None
        return None

    def _find_groups(self, Z: Array, rows: Array, variable: int) -> list[Group] | None:
        Z, rows = Z[:4], rows[:4]
        x, per_row = self._variable(Z, rows, variable)
        entries = int(np.prod(x.shape[1:] if per_row else x.shape, dtype=np.int64))

        def probe(mask: Array) -> Array:
            y = x.copy()
            y.reshape(len(y) if per_row else 1, -1)[:, mask] = np.nan
            return np.isnan(self(y, rows) if variable == STATE else self(Z, rows, variable, y)).any(axis=0)

        try:
            with warnings.catch_warnings(), np.errstate(invalid="ignore"):
                warnings.simplefilter("ignore")
                return find_groups(probe, entries, self.equation.n, max(_FEW, entries // 8))
        except Exception:  # f may not take NaN
            return None

    def _is_complete(self, blocks: list[Block], Z: Array, rows: Array, variable: int) -> bool:
        """Whether the derivatives along a random direction are the sums of those by entries."""
        direction = self._direction(Z, rows, variable)
        total, size = np.zeros(Z.shape), np.zeros(Z.shape)
        for inputs, outputs, D in blocks:
            terms = D * direction.reshape(-1)[inputs]
            total[:, outputs] += terms
            size[:, outputs] += np.abs(terms)
        error = np.abs(total - self._complex_step(Z, rows, variable, direction))
        return bool((error <= 1e-2 * _tolerance(Z.dtype) * (size + 1e-8 * size.max(axis=1, keepdims=True))).all())

    def _variable(self, Z: Array, rows: Array, variable: int) -> tuple[Array, bool]:
        """Its values, and whether each row has its own."""
        if variable == STATE:
            return Z, True
        argument = self.equation.args[variable]
        return (argument[rows], True) if self.equation.batched[variable] else (argument, False)

    def _shifted(self, Z: Array, rows: Array, variable: int, shift: Array) -> Array:
        x = self._variable(Z, rows, variable)[0]
        return self(x + shift, rows) if variable == STATE else self(Z, rows, variable, x + shift)

    def _complex_step(self, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
        """Squire and Trapp, SIAM Review 40, 1998: exact to rounding for analytic f.

        In double precision for float32, too, which has no room for a step that is small beside variables of every size.
        """
        h = 1e-200
        step = direction.astype(np.complex128) * (1j * h)
        return (self._shifted(Z, rows, variable, step).imag / h).astype(Z.dtype)

    def _direction(self, Z: Array, rows: Array, variable: int) -> Array:
        """A direction in which each entry of a variable moves in proportion to its size, more or less, up to 1."""
        x, per_row = self._variable(Z, rows, variable)
        weights = np.random.default_rng(0).uniform(0.5, 1, x.shape[1:] if per_row else x.shape)
        size = np.abs(x).max(axis=0) if per_row else np.abs(x)
        largest = size.max(initial=0) or 1
        return np.asarray(weights * np.where(size > 0, size, largest) / largest).astype(x.dtype)

    def _directional(self, Z: Array, rows: Array, variable: int, direction: Array) -> tuple[Array, Array, Array]:
        """The derivative (m, n) along a direction, whether it is a complex step, which agrees with a difference quotient as it
        does not where f drops Im x, and the doubt (m,) that is left, infinite where quotients disagree."""
        D, doubt = self._difference(Z, rows, variable, direction)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self._complex_step(Z, rows, variable, direction)
        except Exception:
            return D, np.zeros(len(rows), bool), doubt
        tolerance = 1e-1 if Z.dtype == np.float32 else 1e-3
        error = np.abs(found - D).max(axis=1)
        analytic = np.isfinite(doubt) & (error <= np.maximum(tolerance * np.abs(D).max(axis=1), doubt))
        return np.where(analytic[:, None], found, D), analytic, np.where(analytic, 0, doubt)

    def _terms(self, Z: Array, rows: Array, F: Array) -> Array:
        """The size (m,) of the terms of f, whose rounding it has, though it may be small as the difference of large ones."""
        stretch = Z.dtype.type(2.0**-10)
        return np.asarray(np.fmax(np.abs(F), np.abs(self(Z + stretch * Z, rows) - F) / stretch).max(axis=1))

    def _quotient(self, Z: Array, rows: Array, variable: int, direction: Array) -> Array:
        return self._difference(Z, rows, variable, direction)[0]

    def _difference(self, Z: Array, rows: Array, variable: int, direction: Array) -> tuple[Array, Array]:
        """Richardson's extrapolation of two central differences (m, n), and the doubt (m,) about it: how far they differ.

        It is infinite unless the two differ, and the second differences shrink, as those of a smooth function do, and rounding
        counts for little; several steps are tried, in units of the variable. That f does not change at all is believed of a
        step of some per cent, since a small one may be lost in rounding.
        """
        x, per_row = self._variable(Z, rows, variable)
        m, eps = len(rows), float(np.finfo(Z.dtype).eps)
        tol = 2e-2 if Z.dtype == np.float32 else 1e-6
        moved = np.abs(x * direction).reshape(m if per_row else 1, -1).max(axis=1).astype(np.float64)
        others = np.abs(x).reshape(m if per_row else 1, -1).max(axis=1).astype(np.float64)
        # Smaller numbers are zero, or on their way to it, and no step is a part of them.
        nothing = float(np.finfo(Z.dtype).tiny)
        size = np.where(moved > nothing, moved, np.where(others > nothing, others, 1.0))
        factors = [1.0, 1e-2, 1e2, 1e-4, 1e4, 1e-6, 1e6] + (
            [] if (moved > nothing).all() else [1e-9, 1e-12, 1e-15, 1e-18, 1e12]
        )
        best, doubt = np.full((m, self.equation.n), np.nan), np.full(m, np.inf)
        always_flat = np.full(m, True)
        center = self(Z, rows).astype(np.float64)
        terms = self._terms(Z, rows, center)
        for factor in factors:
            left = np.flatnonzero(doubt == np.inf)
            if not len(left):
                break
            step = 2.0 ** np.round(np.log2(eps ** (1 / 3) * size * factor))
            h = step[left] if per_row else np.broadcast_to(step, len(left))
            values = []
            for part in (1.0, -1.0, 0.5, -0.5):
                scaled = part * (step[left].reshape(-1, *[1] * (x.ndim - 1)) if per_row else step.reshape([1] * x.ndim))
                values.append(self._shifted(Z[left], rows[left], variable, (direction * scaled).astype(x.dtype)))
            plus, minus, plus2, minus2 = (v.astype(np.float64) for v in values)
            coarse, fine = (plus - minus) / (2 * h[:, None]), (plus2 - minus2) / h[:, None]
            bend = np.abs(plus - 2 * center[left] + minus) / h[:, None]
            bend2 = np.abs(plus2 - 2 * center[left] + minus2) / (h[:, None] / 2)
            noise = eps * np.fmax(np.abs(plus).max(axis=1), terms[left]) / (h / 2)
            large = np.abs(fine).max(axis=1)
            unequal, kinked = np.abs(coarse - fine).max(axis=1), (bend2 - 0.75 * bend).max(axis=1)
            flat = (large == 0) & (np.abs(coarse).max(axis=1) == 0) & (bend.max(axis=1) == 0)
            always_flat[left] &= flat
            good = np.where(
                flat,
                always_flat[left] & (factor == _FLAT_FACTOR),
                (unequal <= 100 * tol * np.maximum(large, bend.max(axis=1)))
                & (noise <= 100 * tol * np.maximum(large, bend.max(axis=1)))
                & (kinked <= tol * large + 4 * noise),
            )
            value = np.where(good[:, None], fine + (fine - coarse) / 3, fine)
            first = np.isnan(best[left]).all(axis=1)
            best[left[good | first]] = value[good | first]
            doubt[left[good]] = (unequal + noise)[good]
        return best.astype(Z.dtype), doubt


def _is_sparse(J: Any) -> bool:
    return hasattr(J, "toarray")


def _tolerance(dtype: np.dtype) -> float:
    """Of a hook against the values of f, relative to the sum of the sizes of the terms."""
    return 1e-3 if dtype == np.float32 else 1e-6
