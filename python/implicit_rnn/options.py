"""The configuration objects: constraints, solvers, adjoints and optimisers.

Each is a frozen dataclass that only stores and checks its options; what they do is the engines' affair.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

Value = float | int | str | None
Kind = TypeVar("Kind", bound="Option")


class _OptionType(type):
    """Refuses misspelt options with a list of the valid ones."""

    if not TYPE_CHECKING:

        def __call__(cls, *values: Any, **options: Any) -> Any:
            valid = [option.name for option in fields(cls)]
            unknown = sorted(set(options) - set(valid))
            if unknown:
                raise TypeError(
                    f"{cls.__name__} has no option {', '.join(unknown)}; its options are {', '.join(valid) or 'none'}"
                )
            return super().__call__(*values, **options)


@dataclass(frozen=True)
class Option(metaclass=_OptionType):
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
    known = _by_name(kind)
    if isinstance(value, str) and (name := value.lower().replace("_", "")) in known:
        return known[name]()
    names = ", ".join(option.__name__ for option in known.values())
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{argument} is the class {value.__name__}; pass an object: {value.__name__}()")
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{argument} is {value!r}; expected one of {names}")


def from_description(kind: type[Kind], name: str, options: dict[str, Any]) -> Kind:
    """The configuration object of that kind, name and options; ``ValueError`` if there is none such."""
    known = {option.__name__: option for option in _leaves(kind)}
    if name not in known or set(options) - {option.name for option in fields(known[name])}:
        raise ValueError(f"there is no {kind.__name__.lower()} {name} with the options {sorted(options)}")
    return known[name](**options)


@functools.cache
def _by_name(kind: type[Kind]) -> dict[str, type[Kind]]:
    return {option.__name__.lower(): option for option in _leaves(kind)}


def _leaves(kind: type[Kind]) -> list[type[Kind]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


def check_count(name: str, value: object) -> int:
    """A whole number from 1, checked."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number from 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value}")
    return int(value)


def check_number(name: str, value: object) -> None:
    """``TypeError`` unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """``ValueError`` unless it lies strictly between 0 and 1."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


def _check_decay(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_share(name: str, value: float) -> None:
    """``ValueError`` unless it lies from 0 to 1."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie from 0 to 1, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """``ValueError`` unless it is finite and at least 0."""
    check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_positive(name: str, value: float) -> None:
    """``ValueError`` unless it is finite and above 0."""
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


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
        check_fraction("kappa", self.kappa)


@dataclass(frozen=True)
class InfNorm(Constraint):
    """Every row of L|R| sums to at most ``kappa``: a contraction in the maximum norm."""

    kappa: float = 0.95

    def __post_init__(self) -> None:
        check_fraction("kappa", self.kappa)


@dataclass(frozen=True)
class Spectral(Constraint):
    """The largest singular value of L R is at most ``rho``: a contraction in the Euclidean norm."""

    rho: float = 0.95

    def __post_init__(self) -> None:
        check_fraction("rho", self.rho)


@dataclass(frozen=True)
class Monotone(Constraint):
    """I - (L R + RᵀL)/2 ⪰ ``margin`` I: one equilibrium (Winston and Kolter 2020), which Picard may not reach.

    Holds for activations whose slope is never negative, hence not for gelu and silu.
    """

    margin: float = 0.05

    def __post_init__(self) -> None:
        check_fraction("margin", self.margin)


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
        _check_choice("method", self.method, ("trust_region", "newton", "anderson"))
        _check_solver(self.tol, self.max_iterations)


def _check_damping(damping: float) -> None:
    check_number("damping", damping)
    if not 0 < damping <= 1:
        raise ValueError(f"damping must lie in (0, 1], got {damping}")


def _check_solver(tol: float | None, max_iterations: int) -> None:
    if tol is not None:
        check_positive("tol", tol)
    check_count("max_iterations", max_iterations)


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
        check_count("steps", self.steps)


# --- optimisers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer(Option):
    """How a gradient g changes the parameters p."""


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    """One step along each gradient; the formulas are those of Optimisers.jl.

    ``weight_decay`` λ adds λ p to the gradient of all parameters p, as if λ ‖p‖² / 2 were added to the loss.
    """

    learning_rate: float = 1e-3
    weight_decay: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)


@dataclass(frozen=True)
class SGD(GradientDescent):
    """p ← p - η g."""

    learning_rate: float = 1e-1


@dataclass(frozen=True)
class Momentum(GradientDescent):
    """v ← ρ v + η g; p ← p - v."""

    learning_rate: float = 1e-2
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("momentum", self.momentum)


@dataclass(frozen=True)
class Nesterov(GradientDescent):
    """Nesterov's accelerated gradient in its momentum form."""

    learning_rate: float = 1e-2
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("momentum", self.momentum)


@dataclass(frozen=True)
class Adam(GradientDescent):
    """Adam (Kingma and Ba, arXiv 1412.6980)."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.beta1, self.beta2, self.epsilon)


@dataclass(frozen=True)
class AdamW(GradientDescent):
    """Adam whose ``weight_decay`` λ shrinks the parameters by η λ p beside its step (Loshchilov and Hutter, 1711.05101)."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = field(default=1e-2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.beta1, self.beta2, self.epsilon)


@dataclass(frozen=True)
class RMSProp(GradientDescent):
    """v ← ρ v + (1 - ρ) g²; p ← p - η g / (√v + ε), with ρ = ``decay`` (Tieleman and Hinton 2012)."""

    learning_rate: float = 1e-3
    decay: float = 0.9
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("decay", self.decay)
        check_positive("epsilon", self.epsilon)


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """The quasi-Newton method of limited memory (Liu and Nocedal 1989), for all samples at once.

    An epoch is one iteration: a search along the direction that the last ``memory`` steps suggest for one that meets the
    strong Wolfe conditions, with at most ``search_steps`` lengthenings; most often one or two gradients are enough.
    Where no step lowers the loss any more, the parameters stay as they are.
    """

    memory: int = 10
    search_steps: int = 20

    def __post_init__(self) -> None:
        check_count("memory", self.memory)
        check_count("search_steps", self.search_steps)


def _check_moments(beta1: float, beta2: float, epsilon: float) -> None:
    _check_decay("beta1", beta1)
    _check_decay("beta2", beta2)
    check_positive("epsilon", epsilon)


@dataclass(frozen=True)
class Guard(Option):
    """When the training of a net is halted, besides a loss or gradient that is not finite.

    When more than the share ``unconverged`` of an epoch's samples does not reach its equilibrium (1 lets all pass), or
    when the Euclidean norm of the parameters is more than ``parameter_norm`` after an epoch (None: any will do). A net
    that is halted has the parameters from which its last good epoch began: one with finite losses and no more
    unconverged samples than allowed.
    """

    unconverged: float = 1.0
    parameter_norm: float | None = 1e6

    def __post_init__(self) -> None:
        check_share("unconverged", self.unconverged)
        if self.parameter_norm is not None:
            check_positive("parameter_norm", self.parameter_norm)


def check_penalty(weight: float, adjoint: object) -> float:
    """The weight of the Jacobian penalty, checked."""
    check_number("jacobian_penalty", weight)
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
