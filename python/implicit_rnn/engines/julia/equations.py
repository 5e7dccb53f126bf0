"""Equations whose function is Julia code, on the Julia engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_rnn.engines.base import Equation, JuliaFunction, SingularSolution
from implicit_rnn.engines.julia.network import Handle, call
from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver

Array = np.ndarray


class JuliaEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: Equation) -> None:
        assert isinstance(equation.f, JuliaFunction)
        self._equation = equation
        self._args = _lent(equation)  # Julia works on their memory, and on that of the state

    def _bind(self, state: Array) -> None:
        self._state = state
        number = _ask("equation_compile", _describe(self._equation), state.reshape(-1), self._args)
        self._handle = Handle(number)

    def solve(self, solver: Solver, out: Solution) -> None:
        self._bind(out.state)
        outs = (out.status, out.iterations, out.residual, out.rate)
        _ask("equation_solve", self._handle.number, {"name": solver.name, "options": solver.options()}, outs)

    def vjp(self, v: Array) -> list[Array | None]:
        equation = self._equation
        gradients = tuple(
            np.empty_like(array) if equation.is_differentiable(index) else array
            for index, array in enumerate(self._args)
        )
        _ask("equation_vjp", self._handle.number, v.reshape(-1), gradients)
        return [
            _from_julia(gradient, equation.args[index].shape, equation.batched[index])
            if equation.is_differentiable(index)
            else None
            for index, gradient in enumerate(gradients)
        ]

    def jacobian(self, index: int, wanted: Array) -> Array:
        equation = self._equation
        shape = equation.entry_shape(index)
        J = np.empty((equation.samples, *reversed(shape), equation.n), self._state.dtype)
        _ask("equation_jacobian", self._handle.number, index, wanted, J.reshape(-1))
        axes = (0, J.ndim - 1, *range(J.ndim - 2, 0, -1))
        return np.ascontiguousarray(J.transpose(axes)).reshape(equation.samples, equation.n, -1)

    def __getstate__(self) -> dict[str, Any]:
        return {"equation": self._equation, "state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._equation = state["equation"]
        self._args = _lent(self._equation)
        self._bind(state["state"])


def _ask(name: str, *arguments: Any) -> Any:
    answer = call(name, *arguments)
    if not isinstance(answer, tuple):
        return answer
    kind, text = answer
    if kind == "singular":
        raise SingularSolution(int(text))
    raise ValueError(str(text))


def _describe(equation: Equation) -> dict[str, Any]:
    assert isinstance(equation.f, JuliaFunction)
    return {
        "code": equation.f.text,
        "root": equation.root,
        "number": equation.shape == (),
        "scale": [] if equation.scale is None else equation.scale.tolist(),
        "dtype": equation.start.dtype.name,
        "n": equation.n,
        "samples": equation.samples,
        "args": [
            {
                "dtype": array.dtype.name,
                "shape": [*equation.entry_shape(index), *([equation.samples] if equation.batched[index] else [])],
                "batched": equation.batched[index],
            }
            for index, array in enumerate(equation.args)
        ],
    }


def _lent(equation: Equation) -> tuple[Array, ...]:
    """The arguments as flat arrays in Julia's order, such that A[i, j] is the same number in both languages."""
    return tuple(
        np.ascontiguousarray(array.transpose(_reversal(array.ndim, batched))).reshape(-1)
        for array, batched in zip(equation.args, equation.batched, strict=True)
    )


def _from_julia(flat: Array, shape: tuple[int, ...], batched: bool) -> Array:
    """The inverse of ``_lent`` for one argument."""
    axes = _reversal(len(shape), batched)
    return np.asarray(flat.reshape([shape[axis] for axis in axes]).transpose(axes), order="C")


def _reversal(axes: int, batched: bool) -> tuple[int, ...]:
    """All axes in reversed order, but the one that counts the samples, which comes first; its own inverse."""
    return (0, *range(axes - 1, 0, -1)) if batched else tuple(range(axes - 1, -1, -1))
