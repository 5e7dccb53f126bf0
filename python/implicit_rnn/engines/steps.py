"""Training with its steps in Python, on top of any engine's gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from implicit_rnn.engines.base import Halt, Replicas, Samples, TrainerOptions
from implicit_rnn.model.optimizers import GradientDescent
from implicit_rnn.model.topology import Topology
from implicit_rnn.norms import norm

Array = np.ndarray

Gradients = Callable[[Array, Samples, int, Array | None], tuple[Array, Array, Array]]
"""Losses (S,), gradients (S, P) and numbers of unconverged samples (S,) of the nets with parameters (S, P) on some samples, given
the seed of the random vectors of the Jacobian penalty and, for warm starts, initial guesses (S, B, N). These are overwritten with
the equilibria, zero for samples that have not converged."""


class StepTrainer:
    """See ``engines.base.Trainer``."""

    def __init__(self, gradients: Gradients, options: TrainerOptions, topology: Topology, dtype: np.dtype) -> None:
        optimizer = options.optimizer
        assert isinstance(optimizer, GradientDescent)
        self._gradients = gradients
        self._clip = options.clip
        self._guard = options.guard
        self._steps = 0
        self._optimizer = optimizer
        self._moments = optimizer.start((options.nets, topology.parameters), dtype)
        self._states = np.zeros((options.nets, 0, topology.neurons), dtype) if options.warm_start else None
        """(S, B, N) the equilibria of all samples at their last visit, zero before the first"""

    def train(
        self,
        nets: Replicas,
        samples: Samples,
        order: Array,
        batch_size: int,
        rates: Array,
        losses: Array,
        unconverged: Array,
    ) -> None:
        steps = len(rates) // len(order)
        if self._states is not None and self._states.shape[1] != len(samples):
            shape = (len(nets.parameters), len(samples), self._states.shape[-1])
            self._states = np.zeros(shape, self._states.dtype)
        for epoch, permutation in enumerate(order):
            running = nets.halted == Halt.RUNNING
            before = nets.parameters.copy()
            loss, failed = self._epoch(
                nets.parameters, running, samples, permutation, batch_size, rates[epoch * steps :]
            )
            losses[:, epoch] = np.where(running, loss, np.nan)
            unconverged[:, epoch] = np.where(running, failed, 0)
            self._check_guard(nets, running, before, loss, failed / len(samples))

    def _epoch(
        self, P: Array, running: Array, samples: Samples, permutation: Array, batch_size: int, rates: Array
    ) -> tuple[Array, Array]:
        """The mean loss of each net, NaN as soon as a loss or gradient is not finite, and its unconverged samples."""
        total, failed = np.zeros(len(P)), np.zeros(len(P), np.int64)
        alive = running.copy()
        for step, first in enumerate(range(0, len(samples), batch_size)):
            # All samples in their own order, without a copy.
            chosen = slice(None) if batch_size >= len(samples) else permutation[first : first + batch_size]
            batch = _select(samples, chosen)
            states = None if self._states is None else np.ascontiguousarray(self._states[:, chosen])
            self._steps += 1
            loss, G, unsolved = self._gradients(P, batch, self._steps, states)
            if self._states is not None:
                self._states[:, chosen] = states
            failed += np.where(alive, unsolved, 0)
            size = norm(G.astype(np.float64, copy=False))
            alive &= np.isfinite(loss) & np.isfinite(size)
            total += np.where(alive, loss, np.nan) * len(batch)
            long = alive & (size > self._clip)
            G[long] *= (self._clip / size[long])[:, None]
            change = self._optimizer.step(self._moments, P, np.where(alive[:, None], G, 0), rates[step])
            P -= np.where(alive[:, None], change, 0).astype(P.dtype)
        return total / len(samples), failed

    def _check_guard(self, nets: Replicas, running: Array, before: Array, loss: Array, unconverged: Array) -> None:
        """Halt the nets that went wrong in this epoch, and store the good parameters of the others."""
        limit = np.inf if self._guard.parameter_norm is None else self._guard.parameter_norm
        size = norm(nets.parameters.astype(np.float64, copy=False))
        broken, too_many = ~np.isfinite(loss), unconverged > self._guard.unconverged
        good = running & ~broken & ~too_many
        nets.good[good] = before[good]
        halt = np.where(np.isfinite(size) & (size <= limit), Halt.RUNNING, Halt.TOO_LARGE)
        halt = np.where(broken, Halt.NOT_FINITE, np.where(too_many, Halt.TOO_MANY_UNCONVERGED, halt))
        halted = running & (halt != Halt.RUNNING)
        nets.halted[halted] = halt[halted]
        nets.parameters[halted] = nets.good[halted]

    def state(self) -> Array:
        numbers = self._moments.numbers()
        return np.column_stack([numbers, np.full(len(numbers), float(self._steps))])

    def restore(self, state: Array) -> None:
        self._moments.restore(state[:, :-1])
        self._steps = int(state[0, -1])


def _select(samples: Samples, chosen: Array | slice) -> Samples:
    weights = samples.weights
    return Samples(samples.X[chosen], samples.Y[chosen], None if weights is None else weights[chosen])
