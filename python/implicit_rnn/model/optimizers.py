"""The optimisers with their formulas, those of Optimisers.jl, and the guard that halts a training.

Arrays have a leading axis of S nets: parameters p and gradients g (S, P).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from implicit_rnn.options import Option, check_count, check_decay, check_not_negative, check_positive, check_share

Array = np.ndarray


@dataclass(frozen=True)
class Optimizer(Option):
    """How a gradient g changes the parameters p."""


# --- one step along each gradient ----------------------------------------------------------------------------


@dataclass
class Moments:
    """The state of a ``GradientDescent``: averages over the gradients so far, and powers of their decay rates."""

    averages: list[Array]
    """(S, P) each"""
    powers: Array
    """(S, decay rates)"""

    def numbers(self) -> Array:
        """The state as one float64 vector, net by net."""
        return np.concatenate([*self.averages, self.powers], axis=1).astype(np.float64).reshape(-1)

    def restore(self, numbers: Array) -> None:
        """The inverse of ``numbers``."""
        arrays = [*self.averages, self.powers]
        ends = np.cumsum([array.shape[1] for array in arrays])[:-1]
        for array, part in zip(arrays, np.split(numbers.reshape(len(self.powers), -1), ends, axis=1), strict=True):
            array[...] = part


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    """One step along each gradient; the formulas are those of Optimisers.jl.

    ``weight_decay`` λ adds λ p to the gradient of all parameters p, as if λ ‖p‖² / 2 were added to the loss.
    """

    learning_rate: float = 1e-3
    """η; a schedule changes it in the course of a run."""
    weight_decay: float = field(default=0.0, kw_only=True)
    """λ >= 0."""

    averages: ClassVar[int] = 0
    """How many averages over the gradients the formula needs."""

    @property
    def decay_rates(self) -> tuple[float, ...]:
        """The rates whose powers the formula needs."""
        return ()

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)

    def start(self, shape: tuple[int, int], dtype: np.dtype) -> Moments:
        """The state before the first step, for parameters of that shape."""
        return Moments(
            [np.zeros(shape, dtype) for _ in range(self.averages)], np.array([self.decay_rates] * shape[0], dtype)
        )

    def step(self, state: Moments, p: Array, g: Array, rate: float) -> Array:
        """What is to be subtracted from p; ``rate`` is the learning rate of this step."""
        λ = p.dtype.type(self.weight_decay)
        return self.change(state, g + λ * p if λ else g, rate)

    @abstractmethod
    def change(self, state: Moments, g: Array, rate: float) -> Array:
        """What is to be subtracted, by the gradient alone; brings ``state`` up to date."""


@dataclass(frozen=True)
class SGD(GradientDescent):
    """p ← p - η g."""

    learning_rate: float = 1e-1
    """η; a schedule changes it in the course of a run."""

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        return np.asarray(rate * g)


@dataclass(frozen=True)
class Momentum(GradientDescent):
    """v ← ρ v + η g; p ← p - v."""

    learning_rate: float = 1e-2
    """η; a schedule changes it in the course of a run."""
    momentum: float = 0.9
    """ρ in [0, 1)."""

    averages = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("momentum", self.momentum)

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        (v,) = state.averages
        v[...] = self.momentum * v + rate * g
        return v


@dataclass(frozen=True)
class Nesterov(GradientDescent):
    """Nesterov's accelerated gradient in its momentum form: v ← ρ v - η g; p ← p - ρ² v + (1 + ρ) η g, v that before."""

    learning_rate: float = 1e-2
    """η; a schedule changes it in the course of a run."""
    momentum: float = 0.9
    """ρ in [0, 1)."""

    averages = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("momentum", self.momentum)

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        (v,) = state.averages
        ρ = self.momentum
        change = -(ρ**2) * v + (1 + ρ) * rate * g
        v[...] = ρ * v - rate * g
        return np.asarray(change)


@dataclass(frozen=True)
class Adam(GradientDescent):
    """Adam (Kingma and Ba, arXiv 1412.6980).

    m ← β₁ m + (1 - β₁) g; v ← β₂ v + (1 - β₂) g²; p ← p - η m̂ / (√v̂ + ε), with m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ).
    """

    learning_rate: float = 1e-2
    """η; a schedule changes it in the course of a run."""
    beta1: float = 0.9
    """Decay rate of the mean of the gradients, in [0, 1)."""
    beta2: float = 0.999
    """Decay rate of the mean of their squares, in [0, 1)."""
    epsilon: float = 1e-8
    """ε > 0, which bounds the step where gradients vanish."""

    averages = 2

    @property
    def decay_rates(self) -> tuple[float, ...]:
        return self.beta1, self.beta2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("beta1", self.beta1)
        check_decay("beta2", self.beta2)
        check_positive("epsilon", self.epsilon)

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        m, v = state.averages
        m[...] = self.beta1 * m + (1 - self.beta1) * g
        v[...] = self.beta2 * v + (1 - self.beta2) * g * g
        power1, power2 = state.powers[:, :1], state.powers[:, 1:]
        change = m / (1 - power1) / (np.sqrt(v / (1 - power2)) + self.epsilon) * rate
        state.powers *= self.decay_rates
        return np.asarray(change)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam whose ``weight_decay`` λ shrinks the parameters by η λ p beside its step (Loshchilov and Hutter, 1711.05101)."""

    weight_decay: float = field(default=1e-2, kw_only=True)
    """λ >= 0."""

    def step(self, state: Moments, p: Array, g: Array, rate: float) -> Array:
        return self.change(state, g, rate) + p.dtype.type(rate * self.weight_decay) * p


@dataclass(frozen=True)
class RMSProp(GradientDescent):
    """v ← ρ v + (1 - ρ) g²; p ← p - η g / (√v + ε) (Tieleman and Hinton 2012)."""

    learning_rate: float = 1e-3
    """η; a schedule changes it in the course of a run."""
    decay: float = 0.9
    """ρ in [0, 1)."""
    epsilon: float = 1e-8
    """ε > 0, which bounds the step where gradients vanish."""

    averages = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("decay", self.decay)
        check_positive("epsilon", self.epsilon)

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        (v,) = state.averages
        v[...] = self.decay * v + (1 - self.decay) * g * g
        return np.asarray(g * rate / (np.sqrt(v) + self.epsilon))


# --- all samples at once -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """The quasi-Newton method of limited memory (Liu and Nocedal 1989), for all samples at once.

    An epoch is one iteration: a search along the direction that the last ``memory`` steps suggest for one that meets the
    strong Wolfe conditions, with at most ``search_steps`` lengthenings; most often one or two gradients are enough.
    Where no step lowers the loss any more, the parameters stay as they are.
    """

    memory: int = 10
    """Steps that the direction is made from."""
    search_steps: int = 20
    """Largest number of lengthenings in a line search."""

    def __post_init__(self) -> None:
        check_count("memory", self.memory)
        check_count("search_steps", self.search_steps)


OptimizerLike = Optimizer | Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lbfgs"]
"""An optimiser, or the name of one with its default options."""


# --- the guard -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard(Option):
    """When the training of a net is halted, besides a loss or gradient that is not finite.

    When more than the share ``unconverged`` of an epoch's samples does not reach its equilibrium (1 lets all pass), or
    when the Euclidean norm of the parameters is more than ``parameter_norm`` after an epoch (None: any will do). A net
    that is halted has the parameters from which its last good epoch began: one with finite losses and no more
    unconverged samples than allowed.
    """

    unconverged: float = 1.0
    """Largest share of samples without equilibrium, from 0 to 1."""
    parameter_norm: float | None = 1e6
    """Largest Euclidean norm of the parameters; None for any."""

    def __post_init__(self) -> None:
        check_share("unconverged", self.unconverged)
        if self.parameter_norm is not None:
            check_positive("parameter_norm", self.parameter_norm)
