"""Equations whose function is Julia code, on the Julia engine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import numpy as np

from implicit_rnn.device_arrays import DeviceArray
from implicit_rnn.engines.base import Equation, JuliaFunction, SingularSolutionError
from implicit_rnn.engines.julia.calls import Handle, call
from implicit_rnn.engines.julia.network import refuse_others
from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver

Array = np.ndarray


class JuliaEquation:
    """See ``engines.base.CompiledEquation``."""

    def __init__(self, equation: Equation) -> None:
        assert isinstance(equation.f, JuliaFunction)
        self._equation = equation
        self._args = _to_julia(equation)  # Julia works on their memory, and on that of the state
        self._form = _form_of(equation)

    def solve(self, solver: Solver, out: Solution) -> None:
        self._state = out.state
        outs = (out.status, out.iterations, out.residual, out.rate)
        method = _solver(solver)
        self._handle = Handle(
            _ask("equation_solve", self._form.number, out.state.reshape(-1), self._args, method.number, outs)
        )

    def vjp(self, v: Array) -> list[Array | None]:
        equation = self._equation
        gradients = tuple(
            _like(array, equation) if equation.is_differentiable(index) else array
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
        if equation.on_device:
            there = DeviceArray.empty(
                (equation.samples, equation.n, equation.entries(index)), self._state.dtype, equation.device
            )
            _ask("equation_jacobian", self._handle.number, index, wanted, there.reshape(-1))
            return cast("Array", there)
        J = np.empty((equation.samples, *reversed(shape), equation.n), self._state.dtype)
        _ask("equation_jacobian", self._handle.number, index, wanted, J.reshape(-1))
        axes = (0, J.ndim - 1, *range(J.ndim - 2, 0, -1))
        return np.ascontiguousarray(J.transpose(axes)).reshape(equation.samples, equation.n, -1)

    def __getstate__(self) -> dict[str, Any]:
        return {"equation": self._equation, "state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._equation = state["equation"]
        # joblib passes memmaps, which the bridge does not accept.
        self._args, self._state = tuple(map(np.asarray, _to_julia(self._equation))), np.asarray(state["state"])
        self._form = _form_of(self._equation)
        self._handle = Handle(_ask("equation_at", self._form.number, self._state.reshape(-1), self._args))


def _ask(name: str, *arguments: Any) -> Any:
    answer = call(name, *arguments)
    if not isinstance(answer, tuple):
        return answer
    kind, text = answer
    if kind == "singular":
        raise SingularSolutionError([int(sample) for sample in text.split()])
    raise ValueError(str(text))


def _form_of(equation: Equation) -> Handle:
    assert isinstance(equation.f, JuliaFunction)
    args = zip(equation.args, equation.batched, strict=True)
    return _form(
        equation.f.text,
        equation.root,
        equation.shape == (),
        () if equation.scale is None else tuple(equation.scale.tolist()),
        equation.start.dtype,
        equation.start.shape,
        tuple([(array.dtype, array.shape, batched) for array, batched in args]),
        equation.device,
    )


@lru_cache(maxsize=256)
def _form(
    code: str,
    root: bool,
    number: bool,
    scale: tuple[float, ...],
    dtype: np.dtype,
    shape: tuple[int, ...],
    args: tuple[tuple[np.dtype, tuple[int, ...], bool], ...],
    device: str,
) -> Handle:
    """The parts that equations solved in a loop share."""
    samples, n = shape
    description = {
        "code": code,
        "root": root,
        "number": number,
        "scale": list(scale),
        "dtype": dtype.name,
        "n": n,
        "samples": samples,
        "device": device,
        "args": [
            {"dtype": dtype.name, "shape": [*own[1:], own[0]] if batched else [*own], "batched": batched}
            for dtype, own, batched in args
        ],
    }
    return Handle(_ask("equation_form", description))


@lru_cache(maxsize=64)
def _solver(solver: Solver) -> Handle:
    refuse_others("solver", solver)
    return Handle(_ask("equation_solver", solver.name, solver.options()))


def _to_julia(equation: Equation) -> tuple[Array, ...]:
    """The arguments as flat arrays in Julia's order, so that A[i, j] is the same number in both languages."""
    return tuple([_flat(array, batched) for array, batched in zip(equation.args, equation.batched, strict=True)])


def _flat(array: Array, batched: bool) -> Array:
    if array.ndim < 2 or isinstance(array, DeviceArray):  # those there have no more axes than the order is the same for
        return cast("Array", array.reshape(-1))
    return array.transpose(_reversal(array.ndim, batched)).ravel()


def _like(array: Array, equation: Equation) -> Array:
    """An array to be filled in, in the memory where the results of the equation are."""
    if equation.on_device:
        return cast("Array", DeviceArray.empty(array.shape, array.dtype, equation.device))
    return np.empty_like(array)


def _from_julia(flat: Array, shape: tuple[int, ...], batched: bool) -> Array:
    """The inverse of ``_to_julia`` for one argument."""
    if isinstance(flat, DeviceArray):
        return cast("Array", flat.reshape(shape))
    axes = _reversal(len(shape), batched)
    return np.asarray(flat.reshape([shape[axis] for axis in axes]).transpose(axes), order="C")


def _reversal(axes: int, batched: bool) -> tuple[int, ...]:
    """All axes in reversed order, except that of the samples, which comes first; its own inverse."""
    return (0, *range(axes - 1, 0, -1)) if batched else tuple(range(axes - 1, -1, -1))
