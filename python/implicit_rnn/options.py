"""The configuration objects: constraints, solvers, adjoints, losses and optimisers.

Each is a frozen dataclass that only stores and checks its options; what they do is the engines' affair.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

Value = float | int | str | None
Kind = TypeVar("Kind", bound="Option")


@dataclass(frozen=True)
class Option:
    """Base of all configuration objects."""

    @property
    def name(self) -> str:
        """The name by which both engines know it."""
        return type(self).__name__

    def options(self) -> dict[str, Value]:
        """The options by name."""
        return asdict(self)


def choose(kind: type[Kind], value: object, argument: str) -> Kind:
    """``value`` if it is a configuration object of that kind, or the one of that name with its defaults."""
    if isinstance(value, kind):
        return value
    known = {option.__name__.lower(): option for option in _leaves(kind)}
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]()
    names = ", ".join(option.__name__ for option in known.values())
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{argument} is the class {value.__name__}; pass an object: {value.__name__}()")
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{argument} is {value!r}; expected one of {names}")


def from_description(kind: type[Kind], name: str, options: dict[str, Any]) -> Kind:
    """The configuration object of that kind, name and options; ``ValueError`` if there is none such."""
    known = {option.__name__: option for option in _leaves(kind)}
    if name not in known or set(options) - {field.name for field in fields(known[name])}:
        raise ValueError(f"there is no {kind.__name__.lower()} {name} with the options {sorted(options)}")
    return known[name](**options)


def _leaves(kind: type[Kind]) -> list[type[Kind]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, valid))}")


# --- constraints -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraint(Option):
    """What is promised of the recurrent weights R, where L is the bound on the slope of the activation."""

    unique: ClassVar[bool] = True
    """Whether every input has exactly one equilibrium."""


@dataclass(frozen=True)
class Free(Constraint):
    """No constraint, as in Sanokowski (arXiv 2010.10564): equilibria may be many, unstable or out of reach."""

    unique: ClassVar[bool] = False


@dataclass(frozen=True)
class Perron(Constraint):
    """R = e^{-A} K e^{A} with a learnt diagonal A and rows of L|K| summing to at most ``kappa``.

    One equilibrium, global convergence of Picard iteration and a certified error bound, at little cost in
    expressiveness (El Ghaoui et al. 2021, well-posedness by the Perron-Frobenius eigenvalue of L|R|).
    """

    kappa: float = 0.95

    def __post_init__(self) -> None:
        _check_fraction("kappa", self.kappa)


@dataclass(frozen=True)
class InfNorm(Constraint):
    """Every row of L|R| sums to at most ``kappa``: a contraction in the maximum norm."""

    kappa: float = 0.95

    def __post_init__(self) -> None:
        _check_fraction("kappa", self.kappa)


@dataclass(frozen=True)
class Spectral(Constraint):
    """The largest singular value of L R is at most ``rho``: a contraction in the Euclidean norm."""

    rho: float = 0.95

    def __post_init__(self) -> None:
        _check_fraction("rho", self.rho)


@dataclass(frozen=True)
class Monotone(Constraint):
    """I - (L R + RᵀL)/2 ⪰ ``margin`` I: one equilibrium (Winston and Kolter 2020), which Picard may not reach.

    Holds for activations whose slope is never negative, hence not for gelu and silu.
    """

    margin: float = 0.05

    def __post_init__(self) -> None:
        _check_fraction("margin", self.margin)


# --- solvers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver(Option):
    """How an equilibrium is found.

    A sample has converged when ``‖f(u + Rz) - z‖₂ <= tol · max(‖f(u + Rz)‖₂, 1e-3 √n)``, with n the
    neurons of the stage; ``tol=None`` is 1e-10 in float64 and 1e-6 in float32.
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
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")
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
        if not 1 <= self.memory <= 10:
            raise ValueError(f"memory must lie between 1 and 10, got {self.memory}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")
        if self.ridge < 0:
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
        _check_choice("method", self.method, ("trust_region", "newton", "anderson"))
        _check_solver(self.tol, self.max_iterations)


def _check_solver(tol: float | None, max_iterations: int) -> None:
    if tol is not None:
        _check_positive("tol", tol)
    _check_positive("max_iterations", max_iterations)


# --- adjoints --------------------------------------------------------------------------------------------


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
        _check_choice("linear_solver", self.linear_solver, ("auto", "lu", "neumann", "anderson", "gmres"))
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
        _check_positive("steps", self.steps)


# --- optimisers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer(Option):
    """How a gradient changes the parameters; the formulas are those of Optimisers.jl."""

    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)


@dataclass(frozen=True)
class SGD(Optimizer):
    """p ← p - η g."""

    learning_rate: float = 1e-1


@dataclass(frozen=True)
class Momentum(Optimizer):
    """v ← ρ v + η g; p ← p - v."""

    learning_rate: float = 1e-2
    momentum: float = 0.9


@dataclass(frozen=True)
class Nesterov(Optimizer):
    """Nesterov's accelerated gradient in its momentum form."""

    learning_rate: float = 1e-2
    momentum: float = 0.9


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980)."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


LOSSES = ("mse",)


def check_loss(loss: object) -> str:
    """The name of a loss, checked."""
    _check_choice("loss", loss, LOSSES)
    return str(loss)


def check_penalty(weight: float, adjoint: object) -> float:
    """The weight of the Jacobian penalty, checked."""
    if not weight >= 0:
        raise ValueError(f"jacobian_penalty must not be negative, got {weight}")
    if weight > 0 and (isinstance(adjoint, Unrolled) or str(adjoint).lower() == "unrolled"):
        raise ValueError("jacobian_penalty is taken at an equilibrium, which adjoint=Unrolled() does not have")
    return float(weight)


FAILURE_POLICIES = ("raise", "warn", "ignore")


def check_on_failure(value: object) -> str:
    """What to do about unconverged samples, checked."""
    _check_choice("on_failure", value, FAILURE_POLICIES)
    return str(value)
