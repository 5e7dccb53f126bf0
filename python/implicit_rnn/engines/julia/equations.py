"""Generic problems whose function is Julia code, solved and differentiated by the Julia engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_rnn.engines.equations import GenericProblem, JuliaFunction, SingularSolution
from implicit_rnn.engines.julia.network import call
from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver

Array = np.ndarray


class JuliaGeneric:
    """See ``engines.generic.GenericEngine``."""

    def __init__(self, f: JuliaFunction) -> None:
        _ask("generic_check", f.text)

    def solve(self, problem: GenericProblem, solver: Solver, out: Solution) -> None:
        description = _describe(problem) | {"solver": {"name": solver.name, "options": solver.options()}}
        outs = (out.status, out.iterations, out.residual, out.rate)
        _ask("generic_solve", description, out.state.reshape(-1), _lent(problem), outs)

    def vjp(self, problem: GenericProblem, state: Array, v: Array) -> list[Array | None]:
        lent = _lent(problem)
        gradients = tuple(
            np.zeros_like(array) if problem.is_differentiable(index) else array for index, array in enumerate(lent)
        )
        _ask("generic_vjp", _describe(problem), state.reshape(-1), lent, v.reshape(-1), gradients)
        return [
            _from_julia(gradient, problem.args[index].shape, problem.batched[index])
            if problem.is_differentiable(index)
            else None
            for index, gradient in enumerate(gradients)
        ]

    def jacobian(self, problem: GenericProblem, state: Array, index: int, wanted: Array) -> Array:
        shape = problem.entry_shape(index)
        J = np.empty((problem.samples, *reversed(shape), problem.n), state.dtype)
        _ask(
            "generic_jacobian",
            _describe(problem),
            state.reshape(-1),
            _lent(problem),
            index,
            wanted,
            J.reshape(-1),
        )
        axes = (0, J.ndim - 1, *range(J.ndim - 2, 0, -1))
        return np.ascontiguousarray(J.transpose(axes)).reshape(problem.samples, problem.n, -1)


def _ask(name: str, *arguments: Any) -> None:
    answer = call(name, *arguments)
    if answer is None:
        return
    kind, text = answer
    if kind == "singular":
        raise SingularSolution(int(text))
    raise ValueError(str(text))


def _describe(problem: GenericProblem) -> dict[str, Any]:
    assert isinstance(problem.f, JuliaFunction)
    return {
        "code": problem.f.text,
        "root": problem.root,
        "dtype": problem.start.dtype.name,
        "n": problem.n,
        "samples": problem.samples,
        "args": [
            {
                "dtype": array.dtype.name,
                "shape": [*problem.entry_shape(index), *([problem.samples] if problem.batched[index] else [])],
                "batched": problem.batched[index],
            }
            for index, array in enumerate(problem.args)
        ],
    }


def _lent(problem: GenericProblem) -> tuple[Array, ...]:
    """The arguments as flat arrays in Julia's order, such that A[i, j] is the same number in both languages."""
    return tuple(
        np.ascontiguousarray(array.transpose(_reversal(array.ndim, batched))).reshape(-1)
        for array, batched in zip(problem.args, problem.batched, strict=True)
    )


def _from_julia(flat: Array, shape: tuple[int, ...], batched: bool) -> Array:
    """The inverse of ``_lent`` for one argument."""
    axes = _reversal(len(shape), batched)
    return np.array(flat.reshape([shape[axis] for axis in axes]).transpose(axes), order="C")


def _reversal(axes: int, batched: bool) -> tuple[int, ...]:
    """All axes in reversed order, but the one that counts the samples, which comes first; its own inverse."""
    return (0, *range(axes - 1, 0, -1)) if batched else tuple(range(axes - 1, -1, -1))
