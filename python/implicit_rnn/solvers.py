"""Solvers, which find an equilibrium, and adjoints, through which its gradient passes."""

from __future__ import annotations

from dataclasses import dataclass

from implicit_rnn.options import Option, check_choice, check_count, check_number, check_positive

# --- solvers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver(Option):
    """How an equilibrium is found.

    A sample has converged when ``‖f(u + Rz) - z‖₂ <= tol · max(‖f(u + Rz)‖₂, 1e-3 √n)``, with n the
    neurons of the stage; ``tol=None`` is 1e-10 in float64 and 1e-6 in float32.
    ``max_iterations`` bounds the evaluations of f, for each sample and stage.
    """


@dataclass(frozen=True)
class Auto(Solver):
    """Picard iteration while it is fast; samples that are slow go on by Newton's method or Anderson acceleration.

    The last stragglers are left to NLsolve's trust region on the Julia engine.
    """

    tol: float | None = None
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        _check_solver(self.tol, self.max_iterations)


@dataclass(frozen=True)
class Picard(Solver):
    """z ← (1 - damping) z + damping f(u + R z)."""

    damping: float = 1.0
    tol: float | None = None
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        _check_damping(self.damping)
        _check_solver(self.tol, self.max_iterations)


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration (Walker and Ni 2011) over the last ``memory`` iterates, each sample for itself.

    ``ridge`` regularises the least-squares problem relative to its size.
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 1e-10
    tol: float | None = None
    max_iterations: int = 500

    def __post_init__(self) -> None:
        if check_count("memory", self.memory) > 10:
            raise ValueError(f"memory must lie between 1 and 10, got {self.memory}")
        _check_damping(self.damping)
        check_number("ridge", self.ridge)
        if not self.ridge >= 0:
            raise ValueError(f"ridge must not be negative, got {self.ridge}")
        _check_solver(self.tol, self.max_iterations)


@dataclass(frozen=True)
class Newton(Solver):
    """Newton's method with a line search, one LU factorisation per sample and iteration.

    Without a uniqueness guarantee (``Free``) it may find an equilibrium that no iteration would stay at; the sample's
    status is then UNSTABLE.
    """

    tol: float | None = None
    max_iterations: int = 100

    def __post_init__(self) -> None:
        _check_solver(self.tol, self.max_iterations)


@dataclass(frozen=True)
class Chord(Solver):
    """Newton's method with one matrix for many samples, from their mean slope (Julia engine only)."""

    tol: float | None = None
    max_iterations: int = 200

    def __post_init__(self) -> None:
        _check_solver(self.tol, self.max_iterations)


@dataclass(frozen=True)
class NLsolve(Solver):
    """NLsolve.jl on f(u + R z) - z = 0, one sample at a time (Julia engine only).

    ``method`` is "trust_region", "newton" or "anderson".
    """

    method: str = "trust_region"
    tol: float | None = None
    max_iterations: int = 200

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("trust_region", "newton", "anderson"))
        _check_solver(self.tol, self.max_iterations)


def _check_damping(damping: float) -> None:
    check_number("damping", damping)
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {damping}")


def _check_solver(tol: float | None, max_iterations: int) -> None:
    if tol is not None:
        check_positive("tol", tol)
    check_count("max_iterations", max_iterations)


# --- adjoints ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adjoint(Option):
    """How the gradient passes through an equilibrium."""


@dataclass(frozen=True)
class Implicit(Adjoint):
    """The implicit function theorem: (I - RᵀD) λ = ∂L/∂z (Almeida 1987, Pineda 1987).

    ``linear_solver`` is "lu" (exact, per sample), "auto", or on the Julia engine one of the iterative "neumann",
    "anderson" and "gmres" (to ``tol`` relative to λ; what they leave unsolved goes to LU).
    """

    linear_solver: str = "auto"
    tol: float | None = None
    max_iterations: int = 200

    def __post_init__(self) -> None:
        check_choice("linear_solver", self.linear_solver, ("auto", "lu", "neumann", "anderson", "gmres"))
        _check_solver(self.tol, self.max_iterations)


@dataclass(frozen=True)
class JacobianFree(Adjoint):
    """λ = ∂L/∂z, with the inverse of I - RᵀD left out (Fung et al. 2022): cheap, and not the gradient."""


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through ``steps`` Picard iterations from zero (BPTT): their exact gradient.

    The solver is not used, an equilibrium is not needed, and memory grows with the steps.
    """

    steps: int = 8

    def __post_init__(self) -> None:
        check_count("steps", self.steps)


def check_penalty(weight: float, adjoint: object) -> float:
    """The weight of the Jacobian penalty, checked."""
    check_number("jacobian_penalty", weight)
    if not weight >= 0:
        raise ValueError(f"jacobian_penalty must not be negative, got {weight}")
    if weight > 0 and (isinstance(adjoint, Unrolled) or str(adjoint).lower() == "unrolled"):
        raise ValueError("jacobian_penalty is taken at an equilibrium, which adjoint=Unrolled() does not have")
    return float(weight)
