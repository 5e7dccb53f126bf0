"""The settings that affect the result of a run, checked; those that only monitor it are elsewhere."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import numpy as np

from implicit_rnn import options
from implicit_rnn.model.guard import Guard
from implicit_rnn.model.losses import Loss
from implicit_rnn.model.optimizers import LBFGS, GradientDescent, Optimizer, OptimizerLike
from implicit_rnn.solvers import Adjoint, AdjointLike, Solver, SolverLike, check_penalty
from implicit_rnn.training.schedules import Constant, Schedule, ScheduleLike
from implicit_rnn.training.stopping import EarlyStopping

Array = np.ndarray


@dataclass(frozen=True)
class Settings:
    """The settings that, with the data and the initial parameters, determine the result of a run; see ``fit_many``."""

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
    seed: int | None
    warm_start: bool = False

    @classmethod
    def checked(
        cls,
        samples: int,
        loss: Loss,
        *,
        optimizer: OptimizerLike,
        schedule: ScheduleLike,
        epochs: int,
        batch_size: int,
        solver: SolverLike,
        adjoint: AdjointLike,
        clip: float | None,
        jacobian_penalty: float,
        seed: int | None,
        validation_every: int = 1,
        early_stopping: EarlyStopping | None = None,
        restore_best: bool = False,
        guard: Guard = Guard(),
        warm_start: bool = False,
    ) -> Settings:
        """The user's settings for that many samples, checked; ``ValueError`` and ``TypeError`` as in ``fit_many``."""
        if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
            raise TypeError(f"early_stopping must be an EarlyStopping(patience=...), got {early_stopping!r}")
        if clip is not None:
            options.check_number("clip", clip)
            if not clip > 0:
                raise ValueError(f"clip must be positive, got {clip}")
        chosen_adjoint = options.choose(Adjoint, adjoint, "adjoint")
        return cls(
            optimizer=options.choose(Optimizer, optimizer, "optimizer"),
            schedule=options.choose(Schedule, schedule, "schedule"),
            epochs=options.check_count("epochs", epochs),
            batch_size=min(options.check_count("batch_size", batch_size), samples),
            samples=samples,
            loss=loss,
            solver=options.choose(Solver, solver, "solver"),
            adjoint=chosen_adjoint,
            clip=None if clip is None else float(clip),
            jacobian_penalty=check_penalty(jacobian_penalty, chosen_adjoint),
            validation_every=options.check_count("validation_every", validation_every),
            early_stopping=early_stopping,
            restore_best=options.check_flag("restore_best", restore_best),
            guard=options.choose(Guard, guard, "guard"),
            seed=seed,
            warm_start=options.check_flag("warm_start", warm_start),
        )

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
        """The number of steps per epoch, of which the last may have fewer samples."""
        return -(-self.samples // self.batch_size)

    @property
    def reader(self) -> Solver:
        """The solver that computes the outputs of a net in training."""
        return self.adjoint.reader(self.solver)

    def rates(self, steps: Array) -> Array:
        """The learning rates of the steps with these indices, counted from 0 at the start of the run."""
        if not isinstance(self.optimizer, GradientDescent):
            return np.full(len(steps), np.nan)
        found = self.schedule.factors(steps, self.steps_per_epoch, self.epochs * self.steps_per_epoch)
        factors = np.asarray(found, np.float64)
        if factors.shape != steps.shape or not (np.isfinite(factors) & (factors >= 0)).all():
            raise ValueError(
                f"the factors of {self.schedule.name} for {len(steps)} steps are {reprlib.repr(found)}; expected a finite number "
                "for each, none below zero"
            )
        return self.optimizer.learning_rate * factors
