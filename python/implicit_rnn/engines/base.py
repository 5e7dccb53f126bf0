"""The small protocol between the Python API and an engine.

All arrays are C-contiguous NumPy arrays of the problem's dtype unless said otherwise, and engines write results into
arrays the caller allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from implicit_rnn.model.losses import Loss
from implicit_rnn.model.optimizers import Guard, Optimizer
from implicit_rnn.model.topology import Topology
from implicit_rnn.solution import GradientReport, Solution
from implicit_rnn.solvers import Adjoint, Solver


@dataclass(frozen=True)
class Problem:
    """A topology with all that is chosen about its solution and its training: what an engine compiles."""

    topology: Topology
    dtype: str
    solver: Solver
    adjoint: Adjoint
    loss: Loss
    jacobian_penalty: float = 0.0


@dataclass(frozen=True)
class Quality:
    """Summary of the solves behind a gradient."""

    unconverged: int
    """Samples that did not reach their equilibrium."""
    residual: float
    """Worst relative residual of the forward solves."""
    adjoint_residual: float
    """Worst relative residual of the adjoint systems, NaN where one was singular."""


@dataclass(frozen=True)
class Samples:
    """What a loss is taken on."""

    X: np.ndarray
    """(B, inputs)"""
    Y: np.ndarray
    """(B, outputs)"""
    weights: np.ndarray | None = None
    """(B,) with mean 1 over the whole data, None for all equal"""

    def __len__(self) -> int:
        return len(self.X)


class Halt(IntEnum):
    """Why a net takes no part in the training any more; engines set the first four."""

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
        """The optimiser's state and the number of steps as one float64 vector, the same on every engine."""

    def restore(self, state: np.ndarray) -> None:
        """The inverse of ``state``."""


class Program(Protocol):
    """A compiled problem."""

    def solve(self, p: np.ndarray, X: np.ndarray, z0: np.ndarray | None, out: Solution) -> None:
        """Equilibria for X (B, inputs) and the parameters p, from the start z0 (B, N) or zero."""

    def gradient(
        self, p: np.ndarray, samples: Samples, g: np.ndarray, probe: int, report: GradientReport | None = None
    ) -> tuple[float, Quality]:
        """The loss on the samples; its gradient goes to g (parameters,).

        ``probe`` numbers the random vectors of the Jacobian penalty; a ``report`` is filled in.
        """

    def hessian_vector_product(self, p: np.ndarray, samples: Samples, v: np.ndarray, h: np.ndarray) -> None:
        """The Hessian of the loss times v (parameters,) goes to h (parameters,)."""

    def spectral_radius(self, p: np.ndarray, X: np.ndarray, state: np.ndarray, out: np.ndarray) -> None:
        """The largest spectral radius of the stages' Jacobians D R at the states (B, N) goes to out (B,) float64."""

    def trainer(self, optimizer: Optimizer, nets: int, batch_size: int, clip: float, guard: Guard) -> Trainer:
        """A trainer of ``nets`` nets, for all optimisers but LBFGS; ``clip`` bounds the Euclidean norm of a gradient."""


class Engine(Protocol):
    """Something that can compile problems."""

    name: str

    def compile(self, problem: Problem) -> Program:
        """Prepare a problem; cheap, and to be repeated at will."""
