"""The optimisers, with the formulas of Optimisers.jl, for many nets at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_rnn.model.optimizers import SGD, Adam, AdamW, Momentum, Nesterov, Optimizer, RMSProp

Array = np.ndarray


class Rule:
    """Moments per net, and powers of the decay rates (one column each) where the rule has them."""

    def __init__(self, optimizer: Optimizer, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.optimizer: Any = optimizer
        self.moments = [np.zeros(shape, dtype) for _ in range(self.count)]
        self.powers = np.array([self.decays(optimizer)] * shape[0], dtype)

    count = 0

    @staticmethod
    def decays(optimizer: Any) -> tuple[float, ...]:
        return ()

    def step(self, P: Array, g: Array, rate: float) -> Array:
        """What is to be subtracted from the parameters P (nets, parameters), given their gradient g."""
        decay = P.dtype.type(self.optimizer.weight_decay)
        return self.change(g + decay * P if decay else g, rate)

    def change(self, g: Array, rate: float) -> Array:
        raise NotImplementedError

    def state(self) -> Array:
        return np.concatenate([np.concatenate([m.ravel() for m in row]) for row in self._rows()]).astype(np.float64)

    def restore(self, state: Array) -> None:
        parts = np.asarray(state, np.float64).reshape(len(self.powers), -1)
        position = 0
        for array in (*self.moments, self.powers):
            array[...] = parts[:, position : position + array.shape[1]]
            position += array.shape[1]

    def _rows(self) -> list[list[Array]]:
        return [[array[s] for array in (*self.moments, self.powers)] for s in range(len(self.powers))]


class _SGDRule(Rule):
    def change(self, g: Array, rate: float) -> Array:
        return np.asarray(rate * g)


class _MomentumRule(Rule):
    count = 1

    def change(self, g: Array, rate: float) -> Array:
        (v,) = self.moments
        v[...] = self.optimizer.momentum * v + rate * g
        return v


class _NesterovRule(Rule):
    count = 1

    def change(self, g: Array, rate: float) -> Array:
        (v,) = self.moments
        ρ = self.optimizer.momentum
        change = -(ρ**2) * v + (1 + ρ) * rate * g
        v[...] = ρ * v - rate * g
        return np.asarray(change)


class _AdamRule(Rule):
    count = 2

    @staticmethod
    def decays(optimizer: Any) -> tuple[float, ...]:
        return optimizer.beta1, optimizer.beta2

    def change(self, g: Array, rate: float) -> Array:
        m, v = self.moments
        o = self.optimizer
        m[...] = o.beta1 * m + (1 - o.beta1) * g
        v[...] = o.beta2 * v + (1 - o.beta2) * g * g
        power1, power2 = self.powers[:, :1], self.powers[:, 1:]
        change = m / (1 - power1) / (np.sqrt(v / (1 - power2)) + o.epsilon) * rate
        self.powers *= (o.beta1, o.beta2)
        return np.asarray(change)


class _AdamWRule(_AdamRule):
    def step(self, P: Array, g: Array, rate: float) -> Array:
        return self.change(g, rate) + P.dtype.type(rate * self.optimizer.weight_decay) * P


class _RMSPropRule(Rule):
    count = 1

    def change(self, g: Array, rate: float) -> Array:
        (v,) = self.moments
        o = self.optimizer
        v[...] = o.decay * v + (1 - o.decay) * g * g
        return np.asarray(g * rate / (np.sqrt(v) + o.epsilon))


RULES: dict[type[Optimizer], type[Rule]] = {
    SGD: _SGDRule,
    Momentum: _MomentumRule,
    Nesterov: _NesterovRule,
    Adam: _AdamRule,
    AdamW: _AdamWRule,
    RMSProp: _RMSPropRule,
}
