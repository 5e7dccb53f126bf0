"""The settings that decide the result of a run, checked, apart from those that only watch it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from implicit_rnn.model.losses import Loss
from implicit_rnn.model.optimizers import LBFGS, GradientDescent, Guard, Optimizer
from implicit_rnn.solvers import Adjoint, Solver
from implicit_rnn.training.schedules import Constant, Schedule
from implicit_rnn.training.stopping import EarlyStopping

Array = np.ndarray


@dataclass(frozen=True)
class Settings:
    """What, with the data and the parameters at the start, decides the result of a run; see ``fit_many``."""

    optimizer: Optimizer
    schedule: Schedule
    epochs: int
    batch_size: int
    samples: int
    loss: Loss
    solver: Solver
    adjoint: Adjoint
    clip: float | None
    jacobian_penalty: float
    validation_every: int
    early_stopping: EarlyStopping | None
    restore_best: bool
    guard: Guard
    seed: int
    warm_start: bool = False

    def __post_init__(self) -> None:
        if self.warm_start and not self.adjoint.needs_equilibrium:
            raise ValueError(
                f"warm_start gives the solver its first iterate, which adjoint={self.adjoint} does not use: its steps begin at "
                "zero; leave warm_start out, or use Implicit()"
            )
        if isinstance(self.optimizer, LBFGS):
            if self.batch_size < self.samples:
                raise ValueError(
                    f"LBFGS needs all samples in every step, but batch_size is {self.batch_size} of {self.samples} samples; "
                    "leave batch_size out, or use Adam for minibatches"
                )
            if self.clip is not None:
                raise ValueError("clip changes the gradient that LBFGS models; its line search bounds the step already")
            if self.warm_start:
                raise ValueError(
                    "warm_start would make the loss that LBFGS searches along a line depend on the points before; leave it out, "
                    "or use Adam"
                )
            if self.schedule != Constant():
                raise ValueError(f"LBFGS searches for its steps and has no learning rate for {self.schedule} to change")

    @property
    def steps_per_epoch(self) -> int:
        """The last of which may be of fewer samples."""
        return -(-self.samples // self.batch_size)

    @property
    def reader(self) -> Solver:
        """What computes the outputs of a net in training."""
        return self.adjoint.reader(self.solver)

    def rates(self, steps: Array) -> Array:
        """The learning rates of the steps of these numbers, counted from 0 at the start of the run."""
        if not isinstance(self.optimizer, GradientDescent):
            return np.full(len(steps), np.nan)
        factors = self.schedule.factors(steps, self.steps_per_epoch, self.epochs * self.steps_per_epoch)
        return self.optimizer.learning_rate * factors
