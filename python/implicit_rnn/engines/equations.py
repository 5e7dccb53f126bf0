"""Generic problems, z = f(z, ...) or f(z, ...) = 0 for any f: what the two ways to solve them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver

Array = np.ndarray


@dataclass(frozen=True)
class JuliaFunction:
    """A function given as Julia code."""

    text: str
    """An anonymous function, such as ``(z, a) -> cos.(a .* z)``."""
    arguments: tuple[str, ...]
    """The names of its parameters behind the first."""


@dataclass(frozen=True)
class GenericProblem:
    """``z = f(z, *args)``, or ``f(z, *args) = 0`` if ``root``, for each of B samples z of n numbers."""

    f: JuliaFunction | Callable[..., Any]
    root: bool
    start: Array
    """(B, n) the first iterate, of the dtype in which all is done"""
    args: tuple[Array, ...]
    """of the dtype of ``start`` (these can be differentiated), int64 or bool"""
    batched: tuple[bool, ...]
    """whether the first axis of each argument counts the samples"""
    single: bool
    """whether the user posed one problem rather than a batch of one"""
    vectorized: bool
    """whether a Python f takes (samples, n) at once"""

    @property
    def samples(self) -> int:
        """B."""
        return int(self.start.shape[0])

    @property
    def n(self) -> int:
        """Numbers in a sample."""
        return int(self.start.shape[1])

    def is_differentiable(self, index: int) -> bool:
        """Whether that argument has a gradient."""
        return self.args[index].dtype.kind == "f"

    def entry_shape(self, index: int) -> tuple[int, ...]:
        """The shape of that argument as one sample sees it."""
        return self.args[index].shape[1:] if self.batched[index] else self.args[index].shape

    def entries(self, index: int) -> int:
        """The size of that argument as one sample sees it."""
        return int(np.prod(self.entry_shape(index), dtype=np.int64))


class GenericEngine(Protocol):
    """Something that can solve and differentiate generic problems."""

    def solve(self, problem: GenericProblem, solver: Solver, out: Solution) -> None:
        """Solve from ``out.state``, which holds the start, and fill in ``out``."""

    def vjp(self, problem: GenericProblem, state: Array, v: Array) -> list[Array | None]:
        """vᵀ ∂z/∂argument at the solution ``state`` for v (B, n), per differentiable argument; rows of zeros are left out.

        Raises ``SingularSolution``, like ``jacobian``.
        """

    def jacobian(self, problem: GenericProblem, state: Array, index: int, wanted: Array) -> Array:
        """(B, n, size) ∂z/∂argument, NaN for samples that are not ``wanted``."""


class SingularSolution(Exception):  # noqa: N818
    """The Jacobian of the equation is singular at the solution of ``sample``."""

    def __init__(self, sample: int) -> None:
        super().__init__(sample)
        self.sample = sample
