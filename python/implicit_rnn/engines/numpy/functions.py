"""The derivatives of a Python function of an equation: by its hooks ``jac`` and ``vjp``, or by its values.

The hooks are not trusted without a check either: they are compared with the values along one direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from implicit_rnn.engines.base import LARGE, Equation
from implicit_rnn.engines.numpy.differences import FEW, Differences
from implicit_rnn.engines.numpy.operators import Operator, UnsolvedError
from implicit_rnn.engines.numpy.solvers import solve_each
from implicit_rnn.engines.numpy.values import STATE, Values, tolerance
from implicit_rnn.errors import DerivativeWarning, warn

Array = np.ndarray


class PythonFunction:
    """The function of an equation with its derivatives, at iterates Z (m, n) of the samples ``rows`` (m,)."""

    def __init__(self, equation: Equation) -> None:
        self.equation = equation
        self.values = Values(equation)
        self.differences = Differences(self.values)
        self._hook_checked = np.zeros(equation.samples, bool)

    @cached_property
    def is_large(self) -> bool:
        """Whether the Jacobian of a sample is an ``Operator`` rather than a dense matrix."""
        equation = self.equation
        if FEW < equation.n <= LARGE and (equation.jac or equation.vjp):
            return equation.jac is None or _is_sparse(self._given(equation.start[:1], np.array([0]))[0])
        return equation.n > LARGE

    def conditions(self, Z: Array, rows: Array) -> Array:
        """c = f(z) - z, or c = f(z) of a root, (m, n)."""
        return self._conditions_of(self.values.real(Z, rows), Z)

    def conditions_in_doubt(self, Z: Array, rows: Array) -> Array:
        """c, at least as far from zero as the rounding of the arguments may have moved it."""
        F = self.values.real(Z, rows)
        C = self._conditions_of(F, Z)
        doubt = np.finfo(Z.dtype).eps * self.values.terms_of_arguments(Z, rows, F)
        return C + np.copysign(doubt, C).astype(Z.dtype)

    def rounding(self, Z: Array, there: Array, A: Array, A_there: Array, rows: Array) -> Array:
        """The deviation of c from the trapezoidal rule, which is exact where A is linear: it shows the rounding of constants."""
        way = there - Z
        change = self.conditions(there, rows) - self.conditions(Z, rows)
        change -= np.einsum("bij,bj->bi", A + A_there, way) / 2
        return np.where(np.isfinite(change), change, 0)

    def solved_by_zero(self, rows: Array) -> Array:
        """Whether z = 0 is a solution of each sample."""
        solved = np.zeros(len(rows), bool)
        for part in [slice(None)] if self.values.takes_all else [slice(k, k + 1) for k in range(len(rows))]:
            with contextlib.suppress(Exception):  # f need not have a value there
                solved[part] = ~self.values.real(np.zeros_like(self.equation.start[rows[part]]), rows[part]).any(axis=1)
        return solved

    def _conditions_of(self, F: Array, Z: Array) -> Array:
        return F if self.equation.root else F - Z

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
            J = self._given(Z, rows) if equation.jac is not None else self._rows_of_products(Z, rows)
            if isinstance(J, list):
                J = np.stack([m.toarray() if _is_sparse(m) else m for m in J])
            J = J.astype(Z.dtype)
            direction = self.differences.direction(Z, rows, STATE)
            self._check_jacobian(J @ direction, np.abs(J) @ np.abs(direction), direction, Z, rows, certain)
            return J
        J = np.zeros((len(rows), n, n), Z.dtype)
        for inputs, outputs, D in self.differences.derivatives(Z, rows, STATE, certain):
            J[:, outputs, inputs] = D
        return J

    def operator(self, z: Array, row: int, certain: bool = False) -> Operator:
        """A = ∂c/∂z of one sample with many unknowns at z (n,), without a dense matrix unless ``jac`` gives one."""
        equation, rows, Z = self.equation, np.array([row]), z[None]
        matrix: Any | None = None
        transposed: Callable[[Array], Array] | None = None
        if equation.jac is not None:
            matrix = self._given(Z, rows)[0]
            direction = self.differences.direction(Z, rows, STATE)
            products = (matrix @ direction)[None], (abs(matrix) @ abs(direction))[None]
            self._check_jacobian(*products, direction, Z, rows, certain)
        elif equation.vjp is not None:

            def transposed(v: Array) -> Array:
                return self.products(v[None].astype(z.dtype), Z, rows)[0][0]
        else:
            matrix = self._sparse_jacobian(Z, rows, certain)
        analytic = matrix is None and bool(self.differences.is_analytic(Z, rows, STATE, certain)[0])
        derivative = self.differences.complex_step if analytic else self.differences.quotient

        def product(d: Array) -> Array:
            unit = np.abs(d).max()
            if unit == 0:
                return np.zeros_like(z)
            return unit * derivative(Z, rows, STATE, (d / unit).astype(z.dtype))[0]

        tol = 1e-4 if z.dtype == np.float32 else 1e-10
        product_tol = tol if analytic or matrix is not None else max(tol, 1e-6)

        def make() -> Any | None:
            if equation.n > LARGE:
                return self._sparse_jacobian(Z, rows, certain)
            return np.asarray(self.jacobian(Z, rows)[0], np.float64)

        return Operator(equation.n, 0 if equation.root else 1, product, transposed, matrix, make, tol, product_tol)

    def newton_steps(self, Z: Array, rows: Array, C: Array) -> tuple[Array, Array]:
        """-A⁻¹c (m, n), not finite where A has no inverse, and the sizes of the terms of c + A d, |A| (|z| + |step|) (m, n).

        Where there is no matrix A, these sizes are 1.
        """
        if not self.is_large:
            A = self.conditions_jacobian(Z, rows)
            A = np.where(np.isfinite(A).all(axis=(1, 2), keepdims=True), A, np.nan)
            steps = solve_each(A, -C[..., None])[..., 0]
            return steps, (np.abs(A) @ (np.abs(Z) + np.abs(steps))[..., None])[..., 0]
        steps, terms = np.full_like(Z, np.nan), np.ones_like(Z)
        for k, row in enumerate(rows):
            operator = self.operator(Z[k], int(row))
            with contextlib.suppress(UnsolvedError):
                steps[k] = operator.solve(-C[k])
            if operator.matrix is not None:
                d = np.abs(Z[k]) + np.abs(steps[k])
                terms[k] = abs(operator.matrix) @ d + operator.shift * d
        return steps, terms

    def _sparse_jacobian(self, Z: Array, rows: Array, certain: bool) -> Any | None:
        """∂f/∂z of one sample where few of its unknowns are coupled."""
        from scipy import sparse

        if not self.differences.is_analytic(Z, rows, STATE, certain).all():
            return None
        blocks = self.differences.grouped(Z, rows, STATE, certain)
        if blocks is None:
            return None
        none = np.empty(0, np.int64)
        inputs, outputs = (np.concatenate([none, *(block[part] for block in blocks)]) for part in (0, 1))
        values = np.concatenate([np.empty(0, Z.dtype), *(D[0] for *_, D in blocks)])
        return sparse.csc_matrix((values, (outputs, inputs)), (self.equation.n, self.equation.n))

    def _given(self, Z: Array, rows: Array) -> Any:
        """What ``jac`` gives for each sample, (n, n) each: an array, or a list of arrays and sparse matrices."""
        n, jac = self.equation.n, self.equation.jac
        assert jac is not None
        args = self.values.arguments(rows)
        if self.values.takes_all:
            return self._checked_jacobian(jac(Z.copy(), *args), (len(rows), n, n))
        given = (jac(self.values.as_posed(z), *own) for z, own in self.values.each(Z, args))
        return [J if _is_sparse(J) and J.shape == (n, n) else self._checked_jacobian(J, (n, n)) for J in given]

    def _checked_jacobian(self, value: Any, shape: tuple[int, ...]) -> Array:
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.array(None)
        if array.size == 1 and np.prod(shape) == 1 and array.ndim < len(shape):
            array = array.reshape(shape)  # for one unknown a number may be returned
        if array.shape != shape or array.dtype.kind not in "biuf":
            came = f"a {type(value).__name__}" if array.dtype.kind == "O" else f"an array of {array.dtype}"
            raise ValueError(
                f"jac returned {came} of shape {getattr(value, 'shape', array.shape)}; expected real numbers of shape {shape}"
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
        args = self.values.arguments(rows)
        if self.values.takes_all:
            return self._checked_products(vjp(V.copy(), Z.copy(), *args), Z, args)
        parts = [
            self._checked_products(
                vjp(self.values.as_posed(v), self.values.as_posed(z), *own), self.values.as_posed(z), own
            )
            for v, (z, own) in zip(V, self.values.each(Z, args), strict=True)
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
        for inputs, outputs, D in self.differences.derivatives(Z, rows, index, certain=True):
            B[:, outputs, inputs] = D
        return B

    def _argument_jacobian_of_products(self, Z: Array, rows: Array, index: int) -> Array | None:
        """The same, a row at a time, by ``vjp``, if it has products for the argument."""
        n = self.equation.n
        B = np.empty((len(rows), n, self.equation.entries(index)), Z.dtype)
        for k, (z, row) in enumerate(zip(Z[:, None], rows[:, None], strict=True)):
            for i in range(n):
                w = self.products(np.eye(1, n, i, Z.dtype), z, row)[index + 1]
                if w is None:
                    return None
                B[k, i] = w.reshape(-1)
            direction = self.differences.direction(z, row, index)
            along = direction.reshape(-1)
            self._compare_along(
                "vjp", index, (B[k] @ along)[None], (np.abs(B[k]) @ along)[None], direction, z, row, True
            )
        return B

    # --- hooks against the values of f -----------------------------------------------------------------------

    def _check_jacobian(
        self, products: Array, sizes: Array, direction: Array, Z: Array, rows: Array, certain: bool
    ) -> None:
        """``ValueError`` if ∂f/∂z times a direction, with terms of total size ``sizes``, disagrees with the values of f.

        It is checked where the iteration begins and, if ``certain``, at each Z.
        """
        new = np.flatnonzero(~self._hook_checked[rows] | certain)
        if not len(new):
            return
        self._hook_checked[rows[new]] = True
        hook = "vjp" if self.equation.jac is None else "jac"
        self._compare_along(hook, STATE, products[new], sizes[new], direction, Z[new], rows[new], certain)

    def _compare_along(
        self,
        hook: str,
        variable: int,
        products: Array,
        sizes: Array,
        direction: Array,
        Z: Array,
        rows: Array,
        certain: bool,
    ) -> None:
        """Row by row: the ``products`` (m, n) of a hook with a direction, sums of terms of these ``sizes``, and differences."""
        D, analytic, doubt = self.differences.directional(Z, rows, variable, direction)
        largest = sizes.max(axis=1, keepdims=True)
        floor = np.where(analytic[:, None], 30 * np.finfo(Z.dtype).eps, tolerance(Z.dtype)) * largest
        allowed = tolerance(Z.dtype) * sizes + floor + 10 * doubt[:, None]
        self._compare(hook, self.values.name(variable), products, D, allowed, rows, certain)

    def check_products(self, V: Array, products: list[Any], Z: Array, rows: Array) -> None:
        """``ValueError`` if the result of ``vjp`` for z or an argument disagrees with the values of f along a direction."""
        for variable, w in enumerate(products, STATE):
            if w is None:
                continue
            direction = self.differences.direction(Z, rows, variable)
            D, _, doubt = self.differences.directional(Z, rows, variable, direction)
            terms, expected = w * direction, V * D
            own = variable == STATE or self.equation.batched[variable]
            count = len(rows) if own else 1
            got, size = (part.reshape(count, -1).sum(axis=1) for part in (terms, np.abs(terms)))
            want, most, doubts = (
                part.reshape(count, -1).sum(axis=1) for part in (expected, np.abs(expected), np.abs(V) * doubt[:, None])
            )
            allowed = tolerance(Z.dtype) * (size + 1e-6 * most) + 10 * doubts
            self._compare(
                "vjp", self.values.name(variable), got[:, None], want[:, None], allowed[:, None], rows[:count], True
            )

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


def _is_sparse(J: Any) -> bool:
    return hasattr(J, "toarray")
