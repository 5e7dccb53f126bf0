"""L-BFGS on top of any engine's gradient; the line search is SciPy's, with the strong Wolfe conditions."""

from __future__ import annotations

import numpy as np

from implicit_rnn.engines.base import Halt, Program, Replicas, Samples
from implicit_rnn.errors import silenced
from implicit_rnn.model.guard import Guard
from implicit_rnn.model.optimizers import LBFGS

Array = np.ndarray

PROBE = 1
"""The seed of the Jacobian penalty's random vectors, the same for the whole run: a line search needs a fixed function."""


class LBFGSTrainer:
    """See ``engines.base.Trainer``; an epoch is one iteration of each net, on all samples."""

    def __init__(self, program: Program, optimizer: LBFGS, nets: int, parameters: int, guard: Guard) -> None:
        self._program = program
        self._optimizer = optimizer
        self._guard = guard
        self._curvatures = [_Curvature(optimizer.memory, parameters) for _ in range(nets)]

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
        for s, curvature in enumerate(self._curvatures):
            objective = _Objective(self._program, samples, nets.parameters[s])
            for epoch in range(len(order)):
                if nets.halted[s] != Halt.RUNNING:
                    losses[s, epoch], unconverged[s, epoch] = np.nan, 0
                    continue
                p = nets.parameters[s]
                loss, g, failed = objective.at(p)
                losses[s, epoch], unconverged[s, epoch] = loss, failed
                if not np.isfinite(loss):
                    losses[s, epoch] = np.nan
                    nets.halted[s] = Halt.NOT_FINITE
                elif failed > self._guard.unconverged * len(samples):
                    nets.halted[s] = Halt.TOO_MANY_UNCONVERGED
                else:
                    nets.good[s] = p
                    p[...] = self._iterate(objective, curvature, p, loss, g)
                    if self._guard.parameter_norm is not None and np.linalg.norm(p) > self._guard.parameter_norm:
                        nets.halted[s] = Halt.TOO_LARGE
                if nets.halted[s] != Halt.RUNNING:
                    p[...] = nets.good[s]

    def state(self) -> Array:
        return np.stack([curvature.state() for curvature in self._curvatures])

    def restore(self, state: Array) -> None:
        for curvature, part in zip(self._curvatures, state, strict=True):
            curvature.restore(part)

    def _iterate(self, objective: _Objective, curvature: _Curvature, p: Array, loss: float, g: Array) -> Array:
        """The parameters after a step; those before it where no step lowers the loss any more."""
        start = p.astype(np.float64)
        for direction in curvature.directions(g):
            step = objective.search(start, direction, loss, g, self._optimizer.search_steps)
            if step is not None:
                after = (start + step * direction).astype(p.dtype)
                _, g_after, _ = objective.at(after)
                curvature.add(after.astype(np.float64) - start, g_after - g)
                return after
            curvature.clear()
        return p


class _Curvature:
    """The last changes s of the parameters and y of the gradient, newest last, which approximate the Hessian."""

    def __init__(self, memory: int, parameters: int) -> None:
        self._pairs: list[tuple[Array, Array]] = []
        self._memory, self._parameters = memory, parameters

    def directions(self, g: Array) -> list[Array]:
        """Directions to search: first that of the two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), then -g."""
        downhill = -g / max(1.0, float(np.abs(g).sum()))
        return [-self._inverse_hessian_times(g), downhill] if self._pairs else [downhill]

    def add(self, s: Array, y: Array) -> None:
        """Store a step, unless the gradient did not grow along it (no positive curvature)."""
        if s @ y > np.finfo(np.float64).eps * (y @ y):
            self._pairs = [*self._pairs, (s, y)][-self._memory :]

    def clear(self) -> None:
        """Forget all."""
        self._pairs = []

    def _inverse_hessian_times(self, g: Array) -> Array:
        q = g.copy()
        alphas = []
        for s, y in reversed(self._pairs):
            alphas.append((s @ q) / (s @ y))
            q -= alphas[-1] * y
        s, y = self._pairs[-1]
        q *= (s @ y) / (y @ y)
        for (s, y), alpha in zip(self._pairs, reversed(alphas), strict=True):
            q += (alpha - (y @ q) / (s @ y)) * s
        return q

    def state(self) -> Array:
        """The number of pairs and the pairs, padded with zeros."""
        table = np.zeros((self._memory, 2, self._parameters))
        for row, pair in zip(table, self._pairs, strict=False):
            row[...] = pair
        return np.append(float(len(self._pairs)), table)

    def restore(self, state: Array) -> None:
        """The inverse of ``state``."""
        table = state[1:].reshape(self._memory, 2, self._parameters)
        self._pairs = [(s.copy(), y.copy()) for s, y in table[: int(state[0])]]


class _Objective:
    """The loss of one net as a function of its parameters; remembers the last two points of evaluation."""

    def __init__(self, program: Program, samples: Samples, like: Array) -> None:
        self._program, self._samples, self._dtype = program, samples, like.dtype
        self._known: dict[bytes, tuple[float, Array, int]] = {}

    def at(self, p: Array) -> tuple[float, Array, int]:
        """The loss, infinite where it or its gradient is not finite, the gradient in float64, and the samples that failed."""
        point = np.ascontiguousarray(p, self._dtype)
        key = point.tobytes()
        if key not in self._known:
            gradient = np.empty_like(point)
            with np.errstate(over="ignore", invalid="ignore"):
                loss, quality = self._program.gradient(point, self._samples, gradient, PROBE)
            wide = gradient.astype(np.float64)
            sound = np.isfinite(loss) and bool(np.isfinite(wide).all())
            known = (loss if sound else np.inf), wide, quality.unconverged
            self._known = dict([*self._known.items(), (key, known)][-2:])
        return self._known[key]

    def search(self, start: Array, direction: Array, loss: float, g: Array, steps: int) -> float | None:
        """The step size along ``direction`` that meets the strong Wolfe conditions; None if none was found."""
        from scipy.optimize import line_search

        if not np.isfinite(direction).all() or not g @ direction < 0:
            return None

        def value(x: Array) -> float:
            return self.at(x)[0]

        def slope(x: Array) -> Array:
            return self.at(x)[1]

        with silenced(), np.errstate(all="ignore"):  # a failed search is seen by its result
            step, *_, after, _, _ = line_search(value, slope, start, direction, gfk=g, old_fval=loss, maxiter=steps)
        return float(step) if step is not None and after is not None and np.isfinite(after) and after < loss else None
