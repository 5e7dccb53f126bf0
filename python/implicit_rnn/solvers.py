"""Solvers, which find an equilibrium, and adjoints, through which its gradient passes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from implicit_rnn.options import (
    Option,
    check_choice,
    check_count,
    check_fraction,
    check_not_negative,
    check_number,
    choose,
)

# --- solvers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver(Option):
    """How an equilibrium is found.

    A sample has converged when ``‖f(u + Rz) - z‖₂ <= tol · max(‖f(u + Rz)‖₂, 1e-3 √n)``, with n the
    neurons of the stage; ``tol=None`` is 1e-10 in float64 and 1e-6 in float32.
    ``max_iterations`` bounds the evaluations of f, for each sample and stage.
    """

    @property
    @abstractmethod
    def tol(self) -> float | None:
        """The tolerance."""

    @property
    @abstractmethod
    def max_iterations(self) -> int:
        """The largest number of evaluations."""

    def __post_init__(self) -> None:
        _check_limits(self.tol, self.max_iterations)


@dataclass(frozen=True)
class Auto(Solver):
    """Picard iteration while it is fast; samples that are slow go on by Newton's method or Anderson acceleration.

    The last stragglers are left to NLsolve's trust region on the Julia engine.

    Parameters
    ----------
    tol, max_iterations
        Where it ends: at this relative residual, None for 1e-10 in float64 and 1e-6 in float32, or at so many evaluations of f.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> solution = net.equilibrium([[0.5, -1.0]], solver=irnn.Auto(tol=1e-12))
    >>> solution.converged, solution.residual < 1e-12
    (array([ True]), array([ True]))
    """

    tol: float | None = None
    max_iterations: int = 1000


@dataclass(frozen=True)
class Picard(Solver):
    """Fixed-point iteration, z ← (1 - damping) z + damping f(u + R z).

    Parameters
    ----------
    damping
        Share of each step that is taken, in (0, 1].
    tol, max_iterations
        Where it ends: at this relative residual, None for 1e-10 in float64 and 1e-6 in float32, or at so many evaluations of f.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> slow = net.equilibrium([[0.5, -1.0]], solver=irnn.Picard(damping=0.5))
    >>> fast = net.equilibrium([[0.5, -1.0]], solver="picard")
    >>> bool(slow.iterations[0] > fast.iterations[0]), np.allclose(slow.state, fast.state)
    (True, True)
    """

    damping: float = 1.0
    tol: float | None = None
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_damping(self.damping)


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration (Walker and Ni 2011) over the last ``memory`` iterates, each sample for itself.

    Parameters
    ----------
    memory
        Iterates that are combined, from 1 to 10.
    damping
        Share of each step that is taken, in (0, 1].
    ridge
        Regularisation of the least-squares problem, relative to its size.
    tol, max_iterations
        Where it ends: at this relative residual, None for 1e-10 in float64 and 1e-6 in float32, or at so many evaluations of f.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> net.equilibrium([[0.5, -1.0]], solver=irnn.Anderson(memory=3)).converged
    array([ True])
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-10
    tol: float | None = None
    max_iterations: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_count("memory", self.memory) > 10:
            raise ValueError(f"memory must lie between 1 and 10, got {self.memory}")
        _check_damping(self.damping)
        check_not_negative("ridge", self.ridge)


@dataclass(frozen=True)
class Newton(Solver):
    """Newton's method with a line search, one LU factorisation per sample and iteration.

    Without a uniqueness guarantee (``Free``) it may find an equilibrium that no iteration would stay at; the sample's
    status is then UNSTABLE.

    Parameters
    ----------
    tol, max_iterations
        Where it ends: at this relative residual, None for 1e-10 in float64 and 1e-6 in float32, or at so many evaluations of f.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> solution = net.equilibrium([[0.5, -1.0]], solver=irnn.Newton(tol=1e-12))
    >>> solution.converged, solution.iterations < 10
    (array([ True]), array([ True]))
    """

    tol: float | None = None
    max_iterations: int = 100


@dataclass(frozen=True)
class Chord(Solver):
    """Newton's method with one matrix for many samples, from their mean slope (Julia engine only).

    Parameters
    ----------
    tol, max_iterations
        Where it ends: at this relative residual, None for 1e-10 in float64 and 1e-6 in float32, or at so many evaluations of f.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0, engine="julia")
    >>> net.equilibrium([[0.5, -1.0]], solver=irnn.Chord()).converged
    array([ True])
    """

    tol: float | None = None
    max_iterations: int = 200


@dataclass(frozen=True)
class NLsolve(Solver):
    """NLsolve.jl on f(u + R z) - z = 0, one sample at a time (Julia engine only).

    Parameters
    ----------
    method
        "trust_region", "newton" or "anderson".
    tol, max_iterations
        Where it ends: at this relative residual, None for 1e-10 in float64 and 1e-6 in float32, or at so many evaluations of f.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0, engine="julia")
    >>> net.equilibrium([[0.5, -1.0]], solver=irnn.NLsolve("newton")).converged
    array([ True])
    """

    method: str = "trust_region"
    tol: float | None = None
    max_iterations: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, ("trust_region", "newton", "anderson"))


def _check_damping(damping: float) -> None:
    check_number("damping", damping)
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {damping}")


def _check_limits(tol: float | None, max_iterations: int) -> None:
    if tol is not None:
        check_fraction("tol", tol)
    check_count("max_iterations", max_iterations)


def tolerance(tol: float | None, dtype: np.dtype) -> float:
    """The tolerance in force in that precision, where None stands for the default."""
    return float(tol) if tol is not None else (1e-10 if dtype == np.float64 else 1e-6)


SolverLike = Solver | Literal["auto", "picard", "anderson", "newton", "chord", "nlsolve"]
"""A solver, or the name of one with its default options."""


# --- adjoints ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adjoint(Option):
    """How the gradient passes through an equilibrium.

    Examples
    --------
    >>> irnn.Implicit().needs_equilibrium, irnn.Unrolled(8).needs_equilibrium
    (True, False)
    >>> irnn.Unrolled(8).reader(irnn.Auto())
    Picard(damping=1.0, tol=None, max_iterations=9)
    """

    @property
    @abstractmethod
    def needs_equilibrium(self) -> bool:
        """Whether the gradient is that of the loss at an equilibrium only."""

    def reader(self, solver: Solver) -> Solver:
        """What computes the outputs of a net whose gradients come from a solver and this adjoint.

        Parameters
        ----------
        solver
            The solver.
        """
        return solver


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The implicit function theorem: (I - RᵀD) λ = ∂L/∂z (Almeida 1987, Pineda 1987).

    Parameters
    ----------
    linear_solver
        "lu" (exact, per sample), "auto", or on the Julia engine one of the iterative "neumann", "anderson" and "gmres";
        what they leave unsolved goes to LU. "auto" takes what is fast: on the NumPy engine the Neumann series in batches of
        32 and more, and LU where that would take long.
    tol
        Tolerance of the iterative solvers, relative to λ; None is 1e-10 in float64, 1e-6 in float32.
    max_iterations
        Largest number of their iterations.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> X, Y = [[0.5, -1.0]], [[0.3]]
    >>> loss, gradient = net.loss_and_gradient(X, Y, adjoint=irnn.Implicit("lu"))
    >>> step = 1e-6 * gradient / np.linalg.norm(gradient)
    >>> net.parameters += step
    >>> print(f"{(net.loss_and_gradient(X, Y)[0] - loss) / 1e-6 / np.linalg.norm(gradient):.4f}")  # difference quotient
    1.0000
    """

    linear_solver: str = "auto"
    tol: float | None = None
    max_iterations: int = 200

    needs_equilibrium = True

    def __post_init__(self) -> None:
        check_choice("linear_solver", self.linear_solver, ("auto", "lu", "neumann", "anderson", "gmres"))
        _check_limits(self.tol, self.max_iterations)


@dataclass(frozen=True)
class JacobianFree(Adjoint):
    """λ = ∂L/∂z, with the inverse of I - RᵀD left out (Fung et al. 2022): cheap, and not the gradient.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> exact = net.loss_and_gradient([[0.5, -1.0]], [[0.3]])[1]
    >>> cheap = net.loss_and_gradient([[0.5, -1.0]], [[0.3]], adjoint=irnn.JacobianFree())[1]
    >>> bool(cheap @ exact > 0), np.allclose(cheap, exact)
    (True, False)
    """

    needs_equilibrium = True


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through ``steps`` Picard iterations from zero (BPTT): their exact gradient.

    The solver is not used, an equilibrium is not needed, and memory grows with the steps.

    Parameters
    ----------
    steps
        Number of Picard iterations.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> exact = net.loss_and_gradient([[0.5, -1.0]], [[0.3]])[1]
    >>> unrolled = net.loss_and_gradient([[0.5, -1.0]], [[0.3]], adjoint=irnn.Unrolled(50))[1]
    >>> np.allclose(unrolled, exact, atol=1e-8)
    True
    """

    steps: int = 8

    needs_equilibrium = False

    def reader(self, solver: Solver) -> Solver:
        """The unrolled steps: a solver returns the last state whose residual it knows, which takes another evaluation."""
        return Picard(max_iterations=self.steps + 1)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)


AdjointLike = Adjoint | Literal["implicit", "jacobian_free", "unrolled"]
"""An adjoint, or the name of one with its default options."""


def at_equilibrium(adjoint: AdjointLike) -> Adjoint:
    """The adjoint, checked: one of an equilibrium, for a network that is part of something else."""
    chosen = choose(Adjoint, adjoint, "adjoint")
    if not chosen.needs_equilibrium:
        raise ValueError(f"adjoint is {chosen}, which unrolls steps from zero; expected Implicit() or JacobianFree()")
    return chosen


def check_penalty(weight: float, adjoint: Adjoint) -> float:
    """The weight of the Jacobian penalty, checked."""
    check_not_negative("jacobian_penalty", weight)
    if weight > 0 and not adjoint.needs_equilibrium:
        raise ValueError(f"jacobian_penalty is taken at an equilibrium, which adjoint={adjoint.name}() does not have")
    return float(weight)
