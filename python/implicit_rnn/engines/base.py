"""The small protocol between the Python API and an engine: problems are compiled to handles, which solve them.

A network's topology is compiled to a ``CompiledNetwork``, which owns the memory of its computations; with the options of a
``Problem`` this gives a ``Program``. An ``Equation`` of any function is compiled to a ``CompiledEquation``. All arrays are
C-contiguous NumPy arrays of the network's dtype unless stated otherwise, and engines write results into arrays that the caller
allocated. An engine that computes on a device takes a ``DeviceArray`` for samples, targets and states, and for results of their
kind.
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
"""The result of a network that is differentiated."""

DEVICES = ("cpu", "cuda")
"""Where a network, or an equation of Julia code, can be computed."""

WORST_ADJOINT = 1e-3
"""A sample whose adjoint has a relative residual of this or more counts as unconverged."""


@dataclass(frozen=True)
class Problem:
    """The options for solving a network and for its gradients."""

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
    """Whether the last equilibrium of a sample is its next initial guess; a trainer is then for one set of samples."""


@dataclass(frozen=True)
class Quality:
    """Summary of the solves behind a gradient."""

    unconverged: int
    """Number of samples that did not reach their equilibrium."""
    residual: float
    """Worst relative residual of the forward solves."""
    adjoint_residual: float
    """Worst relative residual of the adjoint systems (of the tangents for a jvp), NaN where one was singular."""


@dataclass(frozen=True)
class Samples:
    """The data on which a loss is evaluated."""

    X: np.ndarray
    """(B, inputs)"""
    Y: np.ndarray
    """(B, outputs), or any other targets of a custom loss, with B entries"""
    weights: np.ndarray | None = None
    """(B,) with mean 1 over the whole data, None for all equal"""

    def __len__(self) -> int:
        return len(self.X)


class Halt:
    """Why a net is no longer in training, as plain numbers (see ``solution``); engines set the first four."""

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
    """(nets, parameters) the parameters at the start of the last good epoch of each net"""
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
        """Train the nets that are not halted for len(order) epochs.

        Row e of order (epochs, samples) int64 gives the order of the samples in epoch e; rates (steps,) float64 are the
        learning rates. Filled in: losses (nets, epochs) float64, the mean over the steps, each before its update, and
        unconverged (nets, epochs) int64. A net that its guard halts ends with its good parameters; its losses are NaN in
        epochs with a loss that is not finite and after its halt.
        """

    def state(self) -> np.ndarray:
        """The optimiser's state of each net as a row (nets, numbers) of float64, the same on every engine.

        Where the optimiser counts steps, the count is the last entry of each row.
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

        ``probe`` is the seed of the random vectors of the Jacobian penalty; a ``report`` is filled in.
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

        The equilibria are found from the start z0 (B, N) or zero, as in ``solve``; if z0 holds them, one evaluation of f
        confirms it. The loss and the Jacobian penalty of the problem are not used. A ``report`` is filled in.
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
        """A trainer with these options, for any optimiser but LBFGS."""


class CompiledNetwork(Protocol):
    """A topology in a dtype, with the memory for all its computations, whatever the options."""

    def program(self, problem: Problem) -> Program:
        """The program with these options; it is small and shares the memory, so it can be made and dropped freely."""


# --- equations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JuliaFunction:
    """A function given as Julia code."""

    text: str
    """An anonymous function, such as ``(z, a) -> cos.(a .* z)``."""
    arguments: tuple[str, ...]
    """The names of its parameters after the first."""


LARGE = 2048
"""Number of unknowns beyond which no dense Jacobian of a Python function is formed."""

LARGEST_CHANGE = 0.25
"""Relative change of ∂c/∂z within the error of a solution above which it may not be isolated; at a double root it is 1/2."""


class Equation(NamedTuple):  # twice as fast to make as a frozen dataclass
    """``z = f(z, *args)``, or ``f(z, *args) = 0`` if ``root``, for each of B samples z of n numbers.

    With the size ``‖x‖`` of a vector, which is its Euclidean norm after division by ``scale`` where there is one, a sample
    has converged when its ``step`` is ``f(z) - z``, or for a root the Newton step ``-(∂f/∂z)⁻¹ f(z)``, and

    1. ``‖step‖ <= tol · ‖z‖``, for a fixed point ``tol · ‖f(z)‖``; with a ``scale`` the right side is at least ``tol · √n``; or
    2. ``‖step‖ <= eps · L``, with L the largest ``‖z‖`` (for a fixed point ``‖f(z)‖``) of all iterates so far, and
       steps do not shrink (for a root: no part of the step makes the conditions smaller); or
    3. ``‖step‖ <= eps · L`` and steps shrink slowly (each to more than 0.4 of the previous), are below ``eps² · L`` or the
       last, and z = 0 is a solution, one that attracts if it is a fixed point: zero is then the result.

    There is no other floor, so the result does not depend on the unit of z. The reported relative residual is
    ``‖step‖`` over the larger of the right sides, times tol; it is at most tol where a sample has converged.
    ``max_iterations`` bounds the evaluations of f at iterates, trial steps included, for each sample and every solver,
    including compound ones like Auto; ``iterations`` counts them. Evaluations for derivatives are not counted. A sample ends as
    SINGULAR where ∂c/∂z of the conditions c has no inverse, or ‖c‖ has a minimum that is not zero, and no step makes progress.
    """

    f: JuliaFunction | Callable[..., Any]
    root: bool
    start: np.ndarray
    """(B, n) the initial guess, in the dtype of the computation"""
    args: tuple[np.ndarray, ...]
    """of the dtype of ``start`` (these can be differentiated), int64 or bool"""
    batched: tuple[bool, ...]
    """whether the first axis of each argument is that of the samples"""
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
        """Whether the start or an argument is on the device; all results are then on it, too."""
        return self.device != "cpu" and any(isinstance(array, DeviceArray) for array in (self.start, *self.args))

    @property
    def samples(self) -> int:
        """B."""
        return int(self.start.shape[0])

    @property
    def n(self) -> int:
        """Number of unknowns of a sample."""
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
    """An equation ready to be solved; it keeps its solution, and the factorisation there for all derivatives.

    Like the solution that holds it, it can be pickled if the function can.
    """

    def solve(self, solver: Solver, out: Solution) -> None:
        """Solve from ``out.state``, which holds the start, and fill in ``out``; derivatives are then taken at its state."""

    def vjp(self, v: np.ndarray) -> list[np.ndarray | None]:
        """vᵀ ∂z/∂argument at the solution for v (B, n), per argument, None for those without gradient.

        Samples whose row of v is zero are left out. Raises ``SingularSolutionError``, like ``jacobian``.
        """

    def jacobian(self, index: int, wanted: np.ndarray) -> np.ndarray:
        """(B, n, size) ∂z/∂argument at the solution, NaN for samples that are not ``wanted`` (B,)."""


class SingularSolutionError(Exception):
    """The Jacobian of the equation is singular at the solutions of ``samples``."""

    def __init__(self, samples: list[int]) -> None:
        super().__init__(samples)
        self.samples = samples


# --- engines -------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """Compiles networks and equations; both are cheap and can be repeated freely."""

    name: str

    def compile(self, topology: Topology, dtype: str, device: str = "cpu") -> CompiledNetwork:
        """Prepare a network, to be computed on one of ``DEVICES``; EngineError if the engine does not support that device."""

    def compile_equation(self, equation: Equation) -> CompiledEquation:
        """Prepare an equation: with a Python function on the NumPy engine, with Julia code on the Julia engine."""
