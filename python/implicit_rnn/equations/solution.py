"""The solution of an equation, and its derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from implicit_rnn import device_arrays
from implicit_rnn.device_arrays import DeviceArray, check_dtype
from implicit_rnn.engines.base import CompiledEquation, Equation, SingularSolutionError
from implicit_rnn.equations.posing import device_or_host_array, position_of
from implicit_rnn.errors import ConvergenceError
from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver
from implicit_rnn.validation import all_finite, as_real

Array = np.ndarray

MOST_NAMED = 20
"""Singular samples that an error names."""
_NO_BOUND = np.full(1, np.nan)
"""The bound of every sample: NaN, since none is certified."""
_NO_BOUND.flags.writeable = False


@dataclass(frozen=True, repr=False)
class ImplicitSolution(Solution):
    """The solution of ``fixed_point`` or ``root``, and its derivatives with respect to the arguments.

    ``status``, ``iterations`` (evaluations of f), ``residual`` and ``rate`` are per sample, (B,); no ``bound`` is certified.

    Examples
    --------
    >>> solution = irnn.root(lambda z, a, b: z**2 - a * b, [1.0], args=(2.0, 8.0))
    >>> solution.value, solution.names, solution.converged
    (array([4.]), ('a', 'b'), array([ True]))
    >>> irnn.ImplicitSolution.found_by(irnn.Newton(), solution.equation, solution.compiled).value  # once more
    array([4.])
    >>> print(solution.failure())
    None
    """

    equation: Equation = field(kw_only=True)
    compiled: CompiledEquation = field(kw_only=True)

    @classmethod
    def found_by(cls, solver: Solver, equation: Equation, compiled: CompiledEquation) -> ImplicitSolution:
        """Solve an equation.

        Parameters
        ----------
        solver, equation, compiled
            The solver, the equation, and the handle that solves it.
        """
        samples, start = equation.samples, equation.start
        state = cast("Array", DeviceArray.copy_of(start, equation.device)) if equation.on_device else start.copy()
        solution = object.__new__(cls)
        solution.__dict__.update(  # three times as fast as the constructor of a frozen dataclass
            state=state,
            status=np.empty(samples, np.int8),
            iterations=np.empty(samples, np.int32),
            residual=np.empty(samples),
            rate=np.empty(samples),
            bound=_NO_BOUND if samples == 1 else np.ndarray(samples, buffer=_NO_BOUND, strides=(0,)),
            equation=equation,
            compiled=compiled,
        )
        compiled.solve(solver, solution)
        solution._lock()
        return solution

    def _lock(self) -> None:
        """Make the state read-only, since derivatives are taken at it; an array on a device cannot be locked."""
        if isinstance(self.state, np.ndarray):
            self.state.flags.writeable = False

    def __setstate__(self, state: dict[str, Any]) -> None:  # the arrays of a pickle or deep copy can be written to
        self.__dict__.update(state)
        self._lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arguments."""
        return self.equation.names

    @property
    def value(self) -> Array:
        """The solution, of the shape of z0; for unconverged samples the last finite iterate.

        Derivatives are taken at it, so it is read-only; ``value.copy()`` can be written to.
        """
        return self.state.reshape(self.equation.shape)

    def vjp(self, v: ArrayLike) -> dict[str, Array]:
        """The products vᵀ ∂value/∂argument, by the implicit function theorem.

        From c(z, args) = 0 follows ∂z/∂args = -(∂c/∂z)⁻¹ ∂c/∂args.

        Parameters
        ----------
        v
            Of the shape of ``value``, (n,) or (B, n). For v = ∂L/∂value of a scalar loss L(value) the result is ∂L/∂argument.

        Returns
        -------
        The products for all floating-point arguments, by name, each of the shape of its argument; those of shared arguments
        are summed over the batch.

        Raises
        ------
        ConvergenceError
            Where the Jacobian of the equation is singular at a solution, and if v is not zero for a sample that has not
            converged.
        ValueError, TypeError
            For an invalid v.

        Examples
        --------
        >>> solution = irnn.root(lambda z, a, b: z**2 - a * b, [1.0], args=(2.0, 8.0))
        >>> {name: float(product.round(6)) for name, product in solution.vjp([1.0]).items()}
        {'a': 1.0, 'b': 0.25}
        """
        rows = self._rows(v)
        if not (converged := self.converged).all():
            here = rows.numpy() if isinstance(rows, DeviceArray) else rows
            failed = here.any(axis=1) & ~converged
            if failed.any():
                self._no_derivative(failed, "; v must be zero for them")
        gradients = self._differentiate(lambda: self.compiled.vjp(rows))
        return {name: g for name, g in zip(self.equation.names, gradients, strict=True) if g is not None}

    def jacobian(self, argument: str | int) -> Array:
        """The derivatives ∂value/∂argument.

        Parameters
        ----------
        argument
            Its name or position.

        Returns
        -------
        (n, size), or (B, n, size) for a batch, where ``size`` is the number of entries of the argument (of one sample, if it is
        batched), in C order. Rows of samples that have not converged are NaN.

        Raises
        ------
        ConvergenceError
            As for ``vjp``, and for a single problem that has not converged.
        ValueError
            For an unknown argument.
        TypeError
            For an argument that is not of floats.

        Examples
        --------
        >>> solution = irnn.root(lambda z, A, b: A @ z - b, [0.0, 0.0], args=([[2.0, 0.0], [0.0, 4.0]], [1.0, 1.0]))
        >>> print(solution.jacobian("b").round(6))  # the inverse of A
        [[0.5  0.  ]
         [0.   0.25]]
        """
        index = position_of(argument, self.equation.names, "the Jacobian was asked for")
        if not self.equation.is_differentiable(index):
            dtype = self.equation.args[index].dtype
            raise TypeError(
                f"{self.equation.names[index]} is an argument of {dtype}, which has no derivative; pass it as floats"
            )
        wanted = self.converged
        if self.equation.single and not wanted.all():
            self._no_derivative(~wanted, "")
        J: Array = self._differentiate(lambda: self.compiled.jacobian(index, wanted))
        return J.reshape(J.shape[1:]) if self.equation.single else J

    def failure(self) -> str | None:
        """A sentence on the samples that did not converge, or None where all did."""
        sentence = super().failure()
        return sentence and sentence.replace("reach an equilibrium", "converge")

    def _rows(self, v: ArrayLike) -> Array:
        """The vectors to multiply with, (B, n), in the memory where they are."""
        array = device_or_host_array("v", v, self.equation.device)
        if array.shape != self.value.shape:
            raise ValueError(f"v has shape {array.shape}; expected {self.value.shape}, the shape of the value")
        if isinstance(array, DeviceArray):
            check_dtype("v", array, self.state.dtype, "the solution")
            there = array.reshape(self.state.shape)
            device_arrays.check_finite("v", there)
            return cast("Array", there)
        rows = np.ascontiguousarray(as_real("v", array, self.state.dtype)).reshape(self.state.shape)
        if not all_finite(rows):
            raise ValueError("v has NaN or infinity")
        return rows

    def _no_derivative(self, failed: Array, remedy: str) -> None:
        raise ConvergenceError(
            f"{failed.sum()} of {len(failed)} samples did not converge (first sample {np.flatnonzero(failed)[0]}) and have no "
            f"derivative{remedy}",
            self,
        )

    def _differentiate(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except SingularSolutionError as error:
            where = "the solution" if self.equation.single else f"the solution of {named_samples(error.samples)}"
            raise ConvergenceError(
                f"the Jacobian of the equation is singular at {where}, or singular within the solution's error: there the "
                "solution has no derivative (it ceases to exist, or is not the only one nearby)",
                self,
            ) from None

    def __repr__(self) -> str:
        return (
            f"ImplicitSolution({'root' if self.equation.root else 'fixed point'} of shape {self.value.shape}, "
            f"{self.converged.sum()} of {len(self.status)} converged, iterations up to {self.iterations.max()}, "
            f"residual up to {self.residual.max():.2g})"
        )


def named_samples(samples: list[int]) -> str:
    """Samples in an error message: all, or the first of many."""
    named = ", ".join(map(str, samples[:MOST_NAMED])) + (", …" if len(samples) > MOST_NAMED else "")
    return f"sample{'s' if len(samples) > 1 else ''} {named}"
