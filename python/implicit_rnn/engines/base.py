"""The small protocol between the Python API and an engine: what is posed, compiled, becomes a handle that solves.

A network's topology becomes a ``CompiledNetwork``, which has the memory of its computations, and that with the options of a
``Problem`` a ``Program``; an ``Equation`` of any function becomes a ``CompiledEquation``. All arrays are C-contiguous NumPy
arrays of the network's dtype unless said otherwise, and engines write results into arrays the caller allocated. An engine that
computes on a device takes a ``DeviceArray`` for samples, targets, states and what is to be written of their kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from implicit_rnn.device_arrays import DeviceArray
from implicit_rnn.model.guard import Guard
from implicit_rnn.model.losses import Loss
from implicit_rnn.model.optimizers import Optimizer
from implicit_rnn.model.topology import Topology
from implicit_rnn.solution import GradientReport, Solution
from implicit_rnn.solvers import Adjoint, Solver

Of = Literal["outputs", "state"]
"""What of a network is differentiated."""

DEVICES = ("cpu", "cuda")
"""Where a network, or an equation of Julia code, can be computed."""

WORST_ADJOINT = 1e-3
"""A sample whose adjoint is solved to no better relative residual than this counts as unconverged."""


@dataclass(frozen=True)
class Problem:
    """All that is chosen about the solution of a network and its training."""

    solver: Solver
    adjoint: Adjoint
    loss: Loss
    jacobian_penalty: float = 0.0


@dataclass(frozen=True)
class TrainerOptions:
    """How nets are trained side by side."""

    optimizer: Optimizer
    nets: int
    batch_size: int
    clip: float
    """The largest Euclidean norm of a gradient."""
    guard: Guard
    warm_start: bool = False
    """Whether the equilibrium of a sample at its last visit is the first iterate; a trainer is then for one set of samples."""


@dataclass(frozen=True)
class Quality:
    """Summary of the solves behind a gradient."""

    unconverged: int
    """Samples that did not reach their equilibrium."""
    residual: float
    """Worst relative residual of the forward solves."""
    adjoint_residual: float
    """Worst relative residual of the adjoint systems (of the tangents for a jvp), NaN where one was singular."""


@dataclass(frozen=True)
class Samples:
    """What a loss is taken on."""

    X: np.ndarray
    """(B, inputs)"""
    Y: np.ndarray
    """(B, outputs), or what else a loss of Python's takes, with B entries"""
    weights: np.ndarray | None = None
    """(B,) with mean 1 over the whole data, None for all equal"""

    def __len__(self) -> int:
        return len(self.X)


class Halt:
    """Why a net takes no part in the training any more, as plain numbers (see ``solution``); engines set the first four."""

    RUNNING = 0
    NOT_FINITE = 1
    TOO_MANY_UNCONVERGED = 2
    TOO_LARGE = 3
    NO_IMPROVEMENT = 4
    BY_CALLBACK = 5


@dataclass(frozen=True)
class Replicas:
    """Nets in training side by side; engines update the arrays in place."""

    parameters: np.ndarray
    """(nets, parameters)"""
    good: np.ndarray
    """(nets, parameters) those from which the last good epoch of each net began"""
    halted: np.ndarray
    """(nets,) int8 ``Halt``"""

    @classmethod
    def start(cls, parameters: np.ndarray) -> Replicas:
        """Nets about to be trained from these parameters, which are not copied."""
        return cls(parameters, parameters.copy(), np.zeros(len(parameters), np.int8))


class Trainer(Protocol):
    """The state of a training run of one or more nets."""

    def train(
        self,
        nets: Replicas,
        samples: Samples,
        order: np.ndarray,
        batch_size: int,
        rates: np.ndarray,
        losses: np.ndarray,
        unconverged: np.ndarray,
    ) -> None:
        """Train the nets that run for len(order) epochs.

        Row e of order (epochs, samples) int64 gives the samples of epoch e in their order; rates (steps,) float64 are the
        learning rates. Filled in: losses (nets, epochs) float64, the mean over the steps, each before its update, and
        unconverged (nets, epochs) int64. A net that its guard halts ends with its good parameters; the losses of an
        epoch with one that is not finite, and those after its halt, are NaN.
        """

    def state(self) -> np.ndarray:
        """The optimiser's state of each net as a row (nets, numbers) of float64, the same on every engine.

        Where steps count, their number is the last of each row.
        """

    def restore(self, state: np.ndarray) -> None:
        """The inverse of ``state``."""


class Program(Protocol):
    """The calls of a compiled network with the options of a problem."""

    def solve(self, p: np.ndarray, X: np.ndarray, z0: np.ndarray | None, out: Solution) -> None:
        """Equilibria for X (B, inputs) and the parameters p, from the start z0 (B, N) or zero."""

    def read_out(self, p: np.ndarray, state: np.ndarray, out: np.ndarray) -> None:
        """The outputs of the states (B, N) go to out (B, outputs)."""

    def gradient(
        self, p: np.ndarray, samples: Samples, g: np.ndarray, probe: int, report: GradientReport | None = None
    ) -> tuple[float, Quality]:
        """The loss on the samples; its gradient goes to g (parameters,).

        ``probe`` numbers the random vectors of the Jacobian penalty; a ``report`` is filled in.
        """

    def vjp(
        self,
        p: np.ndarray,
        X: np.ndarray,
        z0: np.ndarray | None,
        V: np.ndarray,
        of: Of,
        g: np.ndarray,
        dX: np.ndarray,
        report: GradientReport | None = None,
    ) -> Quality:
        """The gradient of ⟨V, outputs⟩ or ⟨V, state⟩ goes to g (parameters,), that of each sample to dX (B, inputs).

        The equilibria are found from the start z0 (B, N) or zero, as in ``solve``; where z0 holds them, one evaluation of f
        says so. The loss and the Jacobian penalty of the problem play no part. A ``report`` is filled in.
        """

    def jvp(
        self,
        p: np.ndarray,
        X: np.ndarray,
        z0: np.ndarray | None,
        dp: np.ndarray,
        dX: np.ndarray,
        of: Of,
        out: np.ndarray,
        report: GradientReport | None = None,
    ) -> Quality:
        """The derivative of the outputs or states along dp (parameters,) and dX (B, inputs) goes to out (B, outputs or N).

        The equilibria are found as in ``vjp``; the residuals are those of the linear systems of the tangents.
        """

    def hessian_vector_product(self, p: np.ndarray, samples: Samples, v: np.ndarray, h: np.ndarray) -> None:
        """The Hessian of the loss times v (parameters,) goes to h (parameters,)."""

    def spectral_radius(self, p: np.ndarray, X: np.ndarray, state: np.ndarray, out: np.ndarray) -> None:
        """The largest spectral radius of the stages' Jacobians D R at the states (B, N) goes to out (B,) float64."""

    def trainer(self, options: TrainerOptions) -> Trainer:
        """What trains nets so, by any optimiser but LBFGS."""


class CompiledNetwork(Protocol):
    """A topology in a dtype, with the memory of all that is computed of it, whatever the options."""

    def program(self, problem: Problem) -> Program:
        """With these options; it shares the memory and is small, to be made and dropped at will."""


# --- equations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JuliaFunction:
    """A function given as Julia code."""

    text: str
    """An anonymous function, such as ``(z, a) -> cos.(a .* z)``."""
    arguments: tuple[str, ...]
    """The names of its parameters behind the first."""


LARGE = 2048
"""Unknowns beyond which no dense Jacobian is made of a Python function."""

LARGEST_CHANGE = 0.25
"""Relative change of ∂c/∂z within the error of a solution from which on it need not be isolated; at a double root it is 1/2."""


class Equation(NamedTuple):  # which takes half as long to make as a frozen dataclass
    """``z = f(z, *args)``, or ``f(z, *args) = 0`` if ``root``, for each of B samples z of n numbers.

    With the size ``‖x‖`` of a vector, which is its Euclidean norm after division by ``scale`` where there is one, a sample
    has converged when its ``step`` is ``f(z) - z``, or for a root the Newton step ``-(∂f/∂z)⁻¹ f(z)``, and

    1. ``‖step‖ <= tol · ‖z‖``, for a fixed point ``tol · ‖f(z)‖``; with a ``scale`` the right side is at least ``tol · √n``; or
    2. ``‖step‖ <= eps · L``, with L the largest ``‖z‖``, for a fixed point ``‖f(z)‖``, of an iterate seen on the way, and
       steps do not shrink, of a root: no part of the step makes the conditions smaller; or
    3. the same with steps that shrink slowly (to more than 0.4 each), are below ``eps² · L`` or the last, where z = 0 is a
       solution, and attracts if it is a fixed point: that is then the result.

    There is no other floor, so that the result does not depend on the unit of z. The relative residual reported is
    ``‖step‖`` over the larger of the right sides, times tol; it is at most tol where a sample has converged.
    ``max_iterations`` bounds the evaluations of f at iterates, trial steps included, for each sample and every solver, a
    compound one like Auto included; ``iterations`` counts them. Evaluations for derivatives are not counted. A sample ends as
    SINGULAR where ∂c/∂z of the conditions c has no inverse, or ‖c‖ a minimum that is not zero, and no step leads on.
    """

    f: JuliaFunction | Callable[..., Any]
    root: bool
    start: np.ndarray
    """(B, n) the first iterate, of the dtype in which all is done"""
    args: tuple[np.ndarray, ...]
    """of the dtype of ``start`` (these can be differentiated), int64 or bool"""
    batched: tuple[bool, ...]
    """whether the first axis of each argument counts the samples"""
    names: tuple[str, ...]
    """of the arguments"""
    shape: tuple[int, ...]
    """of the solution as it was posed: () or (n,) for one problem, (B, n) for a batch"""
    scale: np.ndarray | None = None
    """(n,) the sizes that the entries of z typically have, of the dtype of ``start``"""
    vectorized: bool = False
    """whether a Python f takes (samples, n) at once"""
    jac: Callable[..., Any] | None = None
    """∂f/∂z of a Python f, see ``fixed_point``"""
    vjp: Callable[..., Any] | None = None
    """products with the partial derivatives of a Python f, see ``fixed_point``"""
    device: str = "cpu"
    """where Julia code runs, one of ``DEVICES``"""

    @property
    def on_device(self) -> bool:
        """Whether the start or an argument is on the device, as all results are then."""
        return self.device != "cpu" and any(isinstance(array, DeviceArray) for array in (self.start, *self.args))

    @property
    def samples(self) -> int:
        """B."""
        return int(self.start.shape[0])

    @property
    def n(self) -> int:
        """Numbers in a sample."""
        return int(self.start.shape[1])

    @property
    def single(self) -> bool:
        """Whether one problem was posed rather than a batch of one."""
        return len(self.shape) < 2

    def is_differentiable(self, index: int) -> bool:
        """Whether that argument has a gradient."""
        return self.args[index].dtype.kind == "f"

    def entry_shape(self, index: int) -> tuple[int, ...]:
        """The shape of that argument as one sample sees it."""
        return self.args[index].shape[1:] if self.batched[index] else self.args[index].shape

    def entries(self, index: int) -> int:
        """The size of that argument as one sample sees it."""
        return int(np.prod(self.entry_shape(index), dtype=np.int64))


class CompiledEquation(Protocol):
    """An equation ready to be solved; it keeps its solution, and the factorisation found there for all derivatives.

    Like the solution that holds it, it can be pickled if the function can.
    """

    def solve(self, solver: Solver, out: Solution) -> None:
        """Solve from ``out.state``, which holds the start, and fill in ``out``, at whose state derivatives are then taken."""

    def vjp(self, v: np.ndarray) -> list[np.ndarray | None]:
        """vᵀ ∂z/∂argument at the solution for v (B, n), per argument, None for those without gradient.

        Samples whose row of v is zero are left out. Raises ``SingularSolutionError``, like ``jacobian``.
        """

    def jacobian(self, index: int, wanted: np.ndarray) -> np.ndarray:
        """(B, n, size) ∂z/∂argument at the solution, NaN for samples that are not ``wanted`` (B,)."""


class SingularSolutionError(Exception):
    """The Jacobian of the equation is singular at the solution of ``sample``."""

    def __init__(self, sample: int) -> None:
        super().__init__(sample)
        self.sample = sample


# --- engines -------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Something that can compile problems and equations; both are cheap, and to be repeated at will."""

    name: str

    def compile(self, topology: Topology, dtype: str, device: str = "cpu") -> CompiledNetwork:
        """Prepare a network, to be computed on one of ``DEVICES``; EngineError where the engine does not have it."""

    def compile_equation(self, equation: Equation) -> CompiledEquation:
        """Prepare an equation: of a Python function on the NumPy engine, of Julia code on the Julia engine."""
