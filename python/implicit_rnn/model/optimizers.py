"""The optimisers and their formulas, which are those of Optimisers.jl.

Arrays have a leading axis of S nets: parameters p and gradients g (S, P).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from implicit_rnn.options import Option, check_count, check_decay, check_not_negative, check_positive

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
        """The state of each net as a row of float64."""
        return np.concatenate([*self.averages, self.powers], axis=1).astype(np.float64)

    def restore(self, numbers: Array) -> None:
        """The inverse of ``numbers``."""
        arrays = [*self.averages, self.powers]
        ends = np.cumsum([array.shape[1] for array in arrays])[:-1]
        for array, part in zip(arrays, np.split(numbers, ends, axis=1), strict=True):
            array[...] = part


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    """One step along each gradient; the formulas are those of Optimisers.jl.

    Parameters
    ----------
    learning_rate
        η; a schedule changes it in the course of a run.
    weight_decay
        λ >= 0, which adds λ p to the gradient of all parameters p, as if λ ‖p‖² / 2 were added to the loss.

    Examples
    --------
    >>> p, g = np.array([[1.0, 2.0]]), np.array([[0.5, -0.5]])  # one net of two parameters
    >>> optimizer = irnn.Momentum(0.1)
    >>> state = optimizer.start(p.shape, p.dtype)
    >>> for _ in range(2):
    ...     p -= optimizer.step(state, p, g, rate=0.1)
    >>> print(p)
    [[0.855 2.145]]
    >>> irnn.Adam().decay_rates
    (0.9, 0.999)
    >>> print(irnn.SGD().change(irnn.SGD().start(p.shape, p.dtype), g, rate=0.1))
    [[ 0.05 -0.05]]
    """

    learning_rate: float = 1e-3
    weight_decay: float = field(default=0.0, kw_only=True)

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
        """The state before the first step.

        Parameters
        ----------
        shape, dtype
            Those of the parameters: (nets, parameters), and float64 or float32.
        """
        return Moments(
            [np.zeros(shape, dtype) for _ in range(self.averages)], np.array([self.decay_rates] * shape[0], dtype)
        )

    def step(self, state: Moments, p: Array, g: Array, rate: float) -> Array:
        """The change to be subtracted from the parameters, weight decay included.

        Parameters
        ----------
        state
            The moments, which are updated.
        p
            Parameters (nets, parameters).
        g
            Their gradients (nets, parameters).
        rate
            The learning rate of this step.

        Returns
        -------
        The change (nets, parameters).
        """
        λ = p.dtype.type(self.weight_decay)
        return self.change(state, g + λ * p if λ else g, rate)

    @abstractmethod
    def change(self, state: Moments, g: Array, rate: float) -> Array:
        """The change to be subtracted due to the gradient alone; parameters as for ``step``.

        Parameters
        ----------
        state
            The moments, which are updated.
        g
            Gradients (nets, parameters).
        rate
            The learning rate of this step.

        Returns
        -------
        The change (nets, parameters).
        """


@dataclass(frozen=True)
class SGD(GradientDescent):
    """Gradient descent, p ← p - η g.

    Parameters
    ----------
    learning_rate
        η; a schedule changes it in the course of a run.
    weight_decay
        λ >= 0.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.SGD(0.3), epochs=200, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

    learning_rate: float = 1e-1

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        return np.asarray(rate * g)


@dataclass(frozen=True)
class Momentum(GradientDescent):
    """Gradient descent with momentum, v ← ρ v + η g; p ← p - v.

    Parameters
    ----------
    learning_rate
        η; a schedule changes it in the course of a run.
    weight_decay
        λ >= 0.
    momentum
        ρ in [0, 1).

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.Momentum(0.05), epochs=200, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

    learning_rate: float = 1e-2
    momentum: float = 0.9

    averages = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("momentum", self.momentum)

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        (v,) = state.averages
        v[...] = self.momentum * v + rate * g
        return v


@dataclass(frozen=True)
class Nesterov(Momentum):
    """Nesterov's accelerated gradient in momentum form: v ← ρ v - η g; p ← p + ρ² v - (1 + ρ) η g, with v before its update.

    Parameters
    ----------
    learning_rate, weight_decay, momentum
        η, λ and ρ, as for ``Momentum``.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.Nesterov(0.05), epochs=200, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

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

    Parameters
    ----------
    learning_rate
        η; a schedule changes it in the course of a run.
    weight_decay
        λ >= 0.
    beta1
        Decay rate of the mean of the gradients, in [0, 1).
    beta2
        Decay rate of the mean of their squares, in [0, 1).
    epsilon
        ε > 0, which bounds the step where gradients vanish.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.Adam(0.02), epochs=200, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

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
        (m, v), g = state.averages, _with_finite_squares(g)
        m[...] = self.beta1 * m + (1 - self.beta1) * g
        v[...] = self.beta2 * v + (1 - self.beta2) * g * g
        power1, power2 = state.powers[:, :1], state.powers[:, 1:]
        change = m / (1 - power1) / (np.sqrt(v / (1 - power2)) + self.epsilon) * rate
        state.powers *= self.decay_rates
        return np.asarray(change)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with weight decay separate from its step (Loshchilov and Hutter, arXiv 1711.05101).

    Parameters
    ----------
    learning_rate, beta1, beta2, epsilon
        η, β₁, β₂ and ε, as for ``Adam``.
    weight_decay
        λ >= 0; the parameters shrink by η λ p in addition to each step.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.AdamW(0.02, weight_decay=1e-3), epochs=200, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

    weight_decay: float = field(default=1e-2, kw_only=True)

    def step(self, state: Moments, p: Array, g: Array, rate: float) -> Array:
        return self.change(state, g, rate) + p.dtype.type(rate * self.weight_decay) * p


@dataclass(frozen=True)
class RMSProp(GradientDescent):
    """v ← ρ v + (1 - ρ) g²; p ← p - η g / (√v + ε) (Tieleman and Hinton 2012).

    Parameters
    ----------
    learning_rate
        η; a schedule changes it in the course of a run.
    weight_decay
        λ >= 0.
    decay
        ρ in [0, 1).
    epsilon
        ε > 0, which bounds the step where gradients vanish.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.RMSProp(0.005), epochs=200, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

    learning_rate: float = 1e-3
    decay: float = 0.9
    epsilon: float = 1e-8

    averages = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("decay", self.decay)
        check_positive("epsilon", self.epsilon)

    def change(self, state: Moments, g: Array, rate: float) -> Array:
        (v,), g = state.averages, _with_finite_squares(g)
        v[...] = self.decay * v + (1 - self.decay) * g * g
        return np.asarray(g * rate / (np.sqrt(v) + self.epsilon))


def _with_finite_squares(g: Array) -> Array:
    """The gradients, clipped so that squares are finite: an infinite average of squares would freeze a parameter for ever."""
    largest = np.finfo(g.dtype).max ** 0.5 / 2
    return np.clip(g, -largest, largest)


# --- all samples at once -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """The limited-memory quasi-Newton method (Liu and Nocedal 1989), for all samples at once.

    An epoch is one iteration: a line search, along the direction given by the last ``memory`` steps, for a step that meets
    the strong Wolfe conditions; usually one or two gradients are enough. Where no step lowers the loss any more, the
    parameters stay as they are.

    Parameters
    ----------
    memory
        Number of steps from which the direction is computed.
    search_steps
        Largest number of step-length increases in a line search.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, optimizer=irnn.LBFGS(), epochs=30, progress=False)
    >>> bool(run.loss[-1] < 0.5 * run.loss[0])
    True
    """

    memory: int = 10
    search_steps: int = 20

    def __post_init__(self) -> None:
        check_count("memory", self.memory)
        check_count("search_steps", self.search_steps)


OptimizerLike = Optimizer | Literal["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lbfgs"]
"""An optimiser, or the name of one with its default options."""
