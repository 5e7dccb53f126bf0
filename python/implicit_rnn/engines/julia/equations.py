"""Equations whose function is Julia code, on the Julia engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_rnn.engines.base import Equation, JuliaFunction, SingularSolution
from implicit_rnn.engines.julia.network import call
from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver

Array = np.ndarray


class JuliaEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: Equation) -> None:
        assert isinstance(equation.f, JuliaFunction)
        _ask("generic_check", equation.f.text)
        self._equation = equation
        self._state = equation.start

    def solve(self, solver: Solver, out: Solution) -> None:
        self._state = out.state
        description = _describe(self._equation) | {"solver": {"name": solver.name, "options": solver.options()}}
        outs = (out.status, out.iterations, out.residual, out.rate)
        _ask("generic_solve", description, out.state.reshape(-1), _lent(self._equation), outs)

    def vjp(self, v: Array) -> list[Array | None]:
        equation = self._equation
        lent = _lent(equation)
        gradients = tuple(
            np.zeros_like(array) if equation.is_differentiable(index) else array for index, array in enumerate(lent)
        )
        _ask("generic_vjp", _describe(equation), self._state.reshape(-1), lent, v.reshape(-1), gradients)
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
        _ask(
            "generic_jacobian",
            _describe(equation),
            self._state.reshape(-1),
            _lent(equation),
            index,
            wanted,
            J.reshape(-1),
        )
        axes = (0, J.ndim - 1, *range(J.ndim - 2, 0, -1))
        return np.ascontiguousarray(J.transpose(axes)).reshape(equation.samples, equation.n, -1)


def _ask(name: str, *arguments: Any) -> None:
    answer = call(name, *arguments)
    if answer is None:
        return
    kind, text = answer
    if kind == "singular":
        raise SingularSolution(int(text))
    raise ValueError(str(text))


def _describe(equation: Equation) -> dict[str, Any]:
    assert isinstance(equation.f, JuliaFunction)
    return {
        "code": equation.f.text,
        "root": equation.root,
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
    return np.array(flat.reshape([shape[axis] for axis in axes]).transpose(axes), order="C")


def _reversal(axes: int, batched: bool) -> tuple[int, ...]:
    """All axes in reversed order, but the one that counts the samples, which comes first; its own inverse."""
    return (0, *range(axes - 1, 0, -1)) if batched else tuple(range(axes - 1, -1, -1))
